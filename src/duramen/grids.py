"""Grids of few-bit integers, and matrices on them: what quantization writes, and what a checkpoint, ``inspect`` and every exporter read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from duramen.problem import Problem

Share = Literal["row", "tensor"] | int
"""What shares a step: so many consecutive inputs of a row, the row, or the whole matrix."""
EXAMPLE = "`W4 g64`, `W3 row`, `W4 g32 affine`"


@dataclass(frozen=True)
class Grid:
    """Integers of so many bits, and what shares a step.

    Attributes:
        bits: 2 to 8.
        share: What shares a step.
        affine: Whether codes are counted from a zero point, 0 to 2^bits − 1; else from −2^(bits−1), and zero is zero.
        narrow: Whether the lowest code of a symmetric grid is left out.
    """

    bits: int
    share: Share = "row"
    affine: bool = False
    narrow: bool = False

    @property
    def least(self) -> int:
        """The lowest code."""
        return 0 if self.affine else int(self.narrow - 2 ** (self.bits - 1))

    @property
    def most(self) -> int:
        """The highest code."""
        return int(2**self.bits - 1 if self.affine else 2 ** (self.bits - 1) - 1)

    def width(self, inputs: int, layer: str = "the matrix") -> int:
        """How many consecutive inputs of a row of ``layer`` share a step.

        Raises:
            Problem: If they do not divide the row.
        """
        if isinstance(self.share, str):
            return inputs
        if inputs % self.share:
            fitting = [f"g{each}" for each in range(8, inputs + 1, 8) if inputs % each == 0]
            raise Problem(
                f"Groups of {self.share} do not divide the {inputs} inputs of {layer}.",
                why="every group has a step of its own, and all are of one size.",
                fix=f"{', '.join([*fitting, '`row`'])}; or leave such layers out (`skip`).",
            )
        return self.share

    @cached_property
    def text(self) -> str:
        """As it is written in recipes."""
        share = f"g{self.share}" if isinstance(self.share, int) else self.share
        return " ".join([f"W{self.bits}", share, *["affine"] * self.affine, *["narrow"] * self.narrow])


def parse_grid(text: str) -> Grid:
    """Reads a grid, such as ``W4 g64``: bits, what shares a step (``gN``, ``row``, ``tensor``), then ``affine`` or ``narrow``.

    Raises:
        Problem: If it reads otherwise.
    """
    first, *words = text.split() or [""]
    bits = re.fullmatch(r"W([2-8])", first)
    share: Share = "row"
    known = {"affine": False, "narrow": False}
    wrong = [] if bits else [first]
    for word in words:
        group = re.fullmatch(r"g([1-9]\d*)", word)
        if group:
            share = int(group[1])
        elif word in ("row", "tensor"):
            share = word  # type: ignore[assignment]
        elif word in known:
            known[word] = True
        else:
            wrong.append(word)
    if wrong or not bits or all(known.values()):
        raise Problem(
            f"{text!r} is no grid: {'narrow and affine' if not wrong else repr(wrong[0])} does not fit.",
            why="it reads W with 2 to 8 bits, then `row`, `tensor` or `gN` inputs that share a step, then `affine` or `narrow`.",
            fix=EXAMPLE,
        )
    return Grid(int(bits[1]), share, **known)


@dataclass(frozen=True)
class Quantized:
    """A matrix on a grid.

    Attributes:
        codes: [O, I], int8, or uint8 on an affine grid.
        steps: α of every row and group, [O, n]; all alike where the matrix shares one.
        zeros: The code of zero for each, [O, n]; None on a symmetric grid.
        grid: The grid.
    """

    codes: Int[Tensor, "O I"]
    steps: Float[Tensor, "O n"]
    zeros: Int[Tensor, "O n"] | None
    grid: Grid

    def weight(self) -> Float[Tensor, "O I"]:
        """α·(code − zero), in float32, or float64 if the steps are."""
        steps = self.steps if self.steps.dtype == torch.float64 else self.steps.float()
        codes = self.codes.to(steps.dtype).view(*steps.shape, -1)
        zeros = 0 if self.zeros is None else self.zeros.to(steps.dtype)[:, :, None]
        return ((codes - zeros) * steps[:, :, None]).view(self.codes.shape)

    @property
    def bits(self) -> float:
        """Bits per weight, with its share of steps and codes of zero."""
        steps = self.steps.numel() * self.steps.element_size() * 8
        zeros = 0 if self.zeros is None else self.zeros.numel() * self.grid.bits
        return self.grid.bits + (steps + zeros) / self.codes.numel()

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored, by the ends of their names."""
        found = {"codes": self.codes, "steps": self.steps}
        return found if self.zeros is None else found | {"zeros": self.zeros}


def encode(
    weight: Float[Tensor, "O I"], steps: Float[Tensor, "O n"], zeros: Float[Tensor, "O n"] | None, grid: Grid
) -> Float[Tensor, "O I"]:
    """The nearest codes, halves to even, counted from zero, as floats of the weight's type.

    Args:
        weight: What to round.
        steps: α of every row and group.
        zeros: Their codes of zero; None on a symmetric grid.
        grid: The grid.
    """
    grouped = (weight.view(*steps.shape, -1) / steps[:, :, None]).round()
    zero = torch.zeros_like(steps) if zeros is None else zeros
    return grouped.clamp(grid.least - zero[:, :, None], grid.most - zero[:, :, None]).view_as(weight)


def pack(codes: Float[Tensor, "O I"], steps: Float[Tensor, "O n"], zeros: Float[Tensor, "O n"] | None, grid: Grid) -> Quantized:
    """A matrix on a grid, from codes that are counted from zero."""
    if zeros is None:
        return Quantized(codes.to(torch.int8), steps, None, grid)
    whole = codes.view(*steps.shape, -1) + zeros[:, :, None]
    return Quantized(whole.view_as(codes).to(torch.uint8), steps, zeros.to(torch.uint8), grid)
