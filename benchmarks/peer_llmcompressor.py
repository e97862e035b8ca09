"""Prunes one model by llm-compressor, in an environment of its own (its pins exclude Duramen's transformers).

    python peer_llmcompressor.py MODEL_FOLDER TOKENS.safetensors {sparsegpt,wanda} {0.5,2:4} DAMPING OUT.safetensors

Writes the weights of all linear layers of the blocks, and prints one JSON line: seconds of pruning alone, and versions.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    """Runs it."""
    folder, tokens_file, method, target, damping, out = sys.argv[1:]
    network = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokens = load_file(tokens_file)["tokens"]
    rows = {"input_ids": tokens.tolist(), "attention_mask": [[1] * tokens.shape[1]] * len(tokens)}
    how = {"sparsity": 0.5, "mask_structure": target} if ":" in target else {"sparsity": float(target)}
    how |= {"targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    modifier = SparseGPTModifier(dampening_frac=float(damping), **how) if method == "sparsegpt" else WandaPruningModifier(**how)
    start = time.perf_counter()
    oneshot(
        model=network, dataset=Dataset.from_dict(rows), recipe=modifier, num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1], shuffle_calibration_samples=False, batch_size=8,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    weights = {
        name: parameter.detach().float().contiguous()
        for name, parameter in network.named_parameters()
        if "layers." in name and parameter.ndim == 2
    }
    save_file(weights, out)
    versions = {name: importlib.metadata.version(name) for name in ("llmcompressor", "torch", "transformers")}
    print(json.dumps({"seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main()
