"""Rounds one model by torchao's half-quadratic quantization (HQQ), in an environment of its own; it needs no tokens.

    python peer_torchao.py MODEL_FOLDER TOKENS.safetensors "W3 g64 affine" OUT.safetensors

Writes the weights of all linear layers of the blocks.
"""

from __future__ import annotations

import sys

import torch
from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq as quantize
from transformers import AutoModelForCausalLM

from worker import Work, block_weights


def main(folder: str, _: str, target: str, out: str) -> None:
    """Runs it."""
    bits, share, affine = target.split()
    assert affine == "affine", "its zero points are free"
    group = int(share.removeprefix("g"))
    how = {"nbits": int(bits.removeprefix("W")), "group_size": group}
    weights = block_weights(AutoModelForCausalLM.from_pretrained(folder, dtype="float32"))
    with Work() as work:
        for name, weight in weights.items():
            codes, scale, zero, _ = quantize(weight, **how, compute_dtype=torch.float32, device="cpu", raw_output=True)
            codes, scale, zero = (
                each.float().reshape(len(weight), -1, size) for each, size in ((codes, group), (scale, 1), (zero, 1))
            )
            weights[name] = ((codes - zero) * scale).reshape(weight.shape)
    work.hand_over(weights, out, "torchao")


if __name__ == "__main__":
    main(*sys.argv[1:])
