"""A pipeline's text encoder in eight bits: of some pipelines it is the largest part, and it runs once for a video.

The weights of its linear layers are held as codes with one step a row, from its largest weight, and decoded when a layer runs; one whole matrix is in memory at a time.
Embeddings and norms stay as they are. Everything else of the pipeline does too.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from duramen.grids import Grid, encode, pack
from duramen.problem import Exit, Problem
from duramen.quantize.steps import choose_steps

EIGHT = Grid(8)
LONGEST = 512
"""Tokens of a prompt that are looked at, where the tokenizer knows no end."""


class CodedLinear(nn.Module):
    """A linear layer that holds its weight as codes.

    Args:
        layer: The layer; its bias is taken as it is.

    Attributes:
        codes: [O, I], int8.
        steps: Of every row, [O, 1], float32.
        bias: [O], or None.
    """

    codes: Tensor
    steps: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        steps, _ = choose_steps(weight, EIGHT, "absmax")
        self.dtype, self.bias = layer.weight.dtype, layer.bias
        self.register_buffer("codes", pack(encode(weight, steps, None, EIGHT), steps, None, EIGHT).codes)
        self.register_buffer("steps", steps)

    @property
    def weight(self) -> Float[Tensor, "O I"]:
        """What the codes say, in the type that the layer had."""
        return (self.codes * self.steps).to(self.dtype)

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """As the layer did."""
        return linear(x, self.weight, self.bias)


@torch.no_grad()
def hold_in_codes(encoder: nn.Module) -> None:
    """Puts all linear layers of a network into eight bits."""
    for name, layer in list(encoder.named_modules()):
        if type(layer) is nn.Linear:
            encoder.set_submodule(name, CodedLinear(layer))


def bytes_held(network: nn.Module) -> int:
    """Bytes of its parameters and buffers, shared ones once."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


@torch.no_grad()
def quantize_text_encoder(pipeline: Any, prompt: str) -> dict[str, Any]:
    """Puts the linear layers of a pipeline's text encoder into eight bits.

    Args:
        pipeline: Of diffusers, with one text encoder; it is changed.
        prompt: What its embeddings are compared on.

    Returns:
        The encoder's class, its bytes before and after, and how far the prompt's embeddings have moved, relative to their norm.

    Raises:
        Problem: If it has no text encoder.
    """
    encoder = getattr(pipeline, "text_encoder", None)
    if not isinstance(encoder, nn.Module):
        raise Problem(
            f"A {type(pipeline).__name__} has no text encoder.", why="its video begins with an image.", fix="leave `--quantize-text` out.",
            code=Exit.INCOMPATIBLE,
        )  # fmt: skip
    most = min(pipeline.tokenizer.model_max_length, LONGEST)
    ids = pipeline.tokenizer(prompt, truncation=True, max_length=most, return_tensors="pt").input_ids.to(
        next(encoder.parameters()).device
    )
    before, dense = bytes_held(encoder), encoder(ids)[0].float()
    hold_in_codes(encoder)
    moved = encoder(ids)[0].float() - dense
    return {
        "encoder": type(encoder).__name__,
        "bytes": {"before": before, "after": bytes_held(encoder)},
        "moved": float(moved.norm() / dense.norm()),
    }
