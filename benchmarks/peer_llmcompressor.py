"""Prunes or rounds one model by llm-compressor, in an environment of its own (its pins exclude Duramen's transformers).

    python peer_llmcompressor.py MODEL_FOLDER TOKENS.safetensors {sparsegpt,wanda} DAMPING {0.5,2:4} OUT.safetensors
    python peer_llmcompressor.py MODEL_FOLDER TOKENS.safetensors gptq DAMPING {"W4 row","W3 g64"} OUT.safetensors

Writes the weights of all linear layers of the blocks. GPTQ takes columns in the order of its default.
"""

from __future__ import annotations

import sys

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from worker import Work, block_weights

ALL = {"ignore": ["re:.*lm_head"]}


def pruning(method: str, target: str, damping: float) -> Modifier:
    """SparseGPT or Wanda."""
    how = {"sparsity": 0.5, "mask_structure": target} if ":" in target else {"sparsity": float(target)}
    how |= ALL | {"targets": ["Linear"]}
    return SparseGPTModifier(dampening_frac=damping, **how) if method == "sparsegpt" else WandaPruningModifier(**how)


def rounding(target: str, damping: float) -> Modifier:
    """GPTQ of weights alone."""
    bits, share, *affine = target.split()
    group = {"strategy": "channel"} if share == "row" else {"strategy": "group", "group_size": int(share.removeprefix("g"))}
    weights = QuantizationArgs(num_bits=int(bits.removeprefix("W")), type="int", symmetric=not affine, **group)
    groups = {"weights": QuantizationScheme(targets=["Linear"], weights=weights)}
    return GPTQModifier(config_groups=groups, dampening_frac=damping, **ALL)


def main(folder: str, tokens_file: str, method: str, damping: str, target: str, out: str) -> None:
    """Runs it."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokens = load_file(tokens_file)["tokens"]
    rows = {"input_ids": tokens.tolist(), "attention_mask": [[1] * tokens.shape[1]] * len(tokens)}
    modifier = rounding(target, float(damping)) if method == "gptq" else pruning(method, target, float(damping))
    with Work() as work:
        oneshot(
            model=network, dataset=Dataset.from_dict(rows), recipe=modifier, num_calibration_samples=len(tokens),
            max_seq_length=tokens.shape[1], shuffle_calibration_samples=False, batch_size=8,
        )  # fmt: skip
    work.hand_over({name: weight.float() for name, weight in block_weights(network).items()}, out, "llmcompressor")


if __name__ == "__main__":
    main(*sys.argv[1:])
