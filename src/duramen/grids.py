"""Grids of few-bit integers, and matrices on them: what quantization writes, and what a checkpoint, ``inspect`` and every exporter read.

A *format* says in one line what is rounded, such as ``W4A8KV8 g64``: weights, the inputs that they meet, and what attention keeps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from duramen.problem import Problem

Share = Literal["row", "tensor"] | int
"""What shares a step: so many consecutive inputs of a row, the row, or the whole matrix."""
EXAMPLE = "`W4 g64`, `W3 row`, `W4A8KV8 g32 affine`, `A8KV4 sinks4`"


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


@dataclass(frozen=True)
class Inputs:
    """How the inputs of a layer are rounded as they come: on the symmetric grid, with a step from the largest of those that share it.

    Attributes:
        bits: 2 to 8.
        group: How many consecutive channels of a token share a step; None for all of them.
    """

    bits: int
    group: int | None = None

    @property
    def grid(self) -> Grid:
        """The grid of one token's channels."""
        return Grid(self.bits, self.group or "row")


@dataclass(frozen=True)
class Cache:
    """How keys, as they are after rotary embedding, and values are rounded: on an affine grid, with a step for every token and head.

    Attributes:
        bits: 2 to 8.
        sinks: How many first tokens keep theirs as they are: those on which much of the attention falls.
    """

    bits: int
    sinks: int = 0


@dataclass(frozen=True)
class Format:
    """What is rounded, and how; whatever is None is not.

    Attributes:
        weights: The weights of linear layers.
        inputs: What those layers read.
        cache: The keys and values of attention.
    """

    weights: Grid | None = None
    inputs: Inputs | None = None
    cache: Cache | None = None

    @property
    def runs(self) -> bool:
        """Whether it says what happens as a network runs, which ordinary weights do not hold."""
        return bool(self.inputs or self.cache)

    @property
    def text(self) -> str:
        """As it is written in recipes."""
        first, words = "", []
        if self.weights:
            grid = self.weights
            first = f"W{grid.bits}"
            share = f"g{grid.share}" if isinstance(grid.share, int) else grid.share
            words = [share, *["affine"] * grid.affine, *["narrow"] * grid.narrow]
        if self.inputs:
            first += f"A{self.inputs.bits}" + (f"g{self.inputs.group}" if self.inputs.group else "")
        if self.cache:
            first += f"KV{self.cache.bits}"
            words += [f"sinks{self.cache.sinks}"] if self.cache.sinks else []
        return " ".join([first, *words])


def parse_format(text: str) -> Format:
    """Reads a format, such as ``W4A8KV8 g64``.

    First come the bits, of weights (``W``), inputs (``A``, by token, or ``A8g32`` by so many channels of it) and keys and values (``KV``); then what shares a
    step of the weights (``row`` unless it says ``gN`` or ``tensor``), ``affine`` or ``narrow`` for them, and ``sinksN`` for keys and values.

    Raises:
        Problem: If it reads otherwise.
    """
    first, *words = text.split() or [""]
    bits = re.fullmatch(r"(?:W([2-8]))?(?:A([2-8])(?:g([1-9]\d*))?)?(?:KV([2-8]))?", first)
    wrong = [] if bits and first else [first]
    of_weights: dict[str, Any] = {}
    of_cache: dict[str, Any] = {}
    for word in words:
        number = re.fullmatch(r"(g|sinks)([1-9]\d*)", word)
        if number and number[1] == "g":
            of_weights["share"] = int(number[2])
        elif number:
            of_cache["sinks"] = int(number[2])
        elif word in ("row", "tensor"):
            of_weights["share"] = word
        elif word in ("affine", "narrow"):
            of_weights[word] = True
        else:
            wrong.append(word)
    if bits and not wrong:
        both = of_weights.get("affine") and of_weights.get("narrow")
        unused = (not bits[1] and list(of_weights)) or (not bits[4] and list(of_cache))
        wrong = (
            ["narrow and affine"]
            if both
            else [f"{unused[0]} without {'KV' if of_cache and not bits[4] else 'W'}"]
            if unused
            else []
        )
    if wrong or not bits:
        raise Problem(
            f"{text!r} is no format: {wrong[0]!r} does not fit.",
            why="it reads `W`, `A`, `KV` with 2 to 8 bits each, or some of these; then for weights `row`, `tensor` or `gN` inputs that share a step, and `affine` "
            "or `narrow`; for keys and values `sinksN`.",
            fix=EXAMPLE,
        )
    return Format(
        Grid(int(bits[1]), **of_weights) if bits[1] else None,
        Inputs(int(bits[2]), int(bits[3]) if bits[3] else None) if bits[2] else None,
        Cache(int(bits[4]), **of_cache) if bits[4] else None,
    )


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
