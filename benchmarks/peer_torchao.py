"""Rounds one model by torchao's half-quadratic quantization (HQQ), in an environment of its own; it needs no tokens.

    python peer_torchao.py MODEL_FOLDER TOKENS.safetensors "W3 g64 affine" OUT.safetensors

Writes the weights of all linear layers of the blocks, and prints one JSON line: seconds of its work alone, and versions.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time

import torch
from safetensors.torch import save_file
from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq as quantize
from transformers import AutoModelForCausalLM


def main() -> None:
    """Runs it."""
    folder, _, target, out = sys.argv[1:]
    bits, share, affine = target.split()
    assert affine == "affine", "its zero points are free"
    network = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    weights = {
        name: parameter.detach()
        for name, parameter in network.named_parameters()
        if "layers." in name and name.endswith(".weight") and parameter.ndim == 2
    }
    start, processor = time.perf_counter(), time.process_time()
    group = int(share.removeprefix("g"))
    how = {"nbits": int(bits.removeprefix("W")), "group_size": group}
    for name, weight in weights.items():
        codes, scale, zero, _ = quantize(weight, **how, compute_dtype=torch.float32, device="cpu", raw_output=True)
        codes, scale, zero = (
            each.float().reshape(len(weight), -1, size) for each, size in ((codes, group), (scale, 1), (zero, 1))
        )
        weights[name] = ((codes - zero) * scale).reshape(weight.shape)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    save_file(weights, out)
    versions = {name: importlib.metadata.version(name) for name in ("torchao", "torch", "transformers")}
    print(json.dumps({"seconds": seconds, "processor_seconds": processor, "versions": versions}))


if __name__ == "__main__":
    main()
