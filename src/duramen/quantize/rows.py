"""Rows of four and of eight bits within one matrix: which rows deserve eight, and the product in whole numbers.

"Quasar-ViT" (Li et al., ICS 2024, arXiv 2407.18175) mixes widths row by row, so that lanes of four bits are never idle. Which rows get eight is decided here exactly: rows do not
interact in a layer's squared error, so those of the largest gain e_r = δ₄Hδ₄ᵀ − δ₈Hδ₈ᵀ are the best set of their number (method sheet, 2.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from duramen.grids import Grid, encode
from duramen.problem import Problem
from duramen.prune.reconstruct import check_shapes
from duramen.quantize.steps import Step, choose_steps

FOUR, EIGHT = Grid(4), Grid(8)
EXACT = 2**24
"""Whole numbers up to which float32 counts without rounding."""


@dataclass(frozen=True)
class MixedRows:
    """A matrix whose rows have four or eight bits.

    Attributes:
        codes: [O, I], int8.
        steps: α of every row, [O].
        eight: Which rows have eight bits, [O].
    """

    codes: Int[Tensor, "O I"]
    steps: Float[Tensor, "O"]
    eight: Bool[Tensor, "O"]

    def weight(self) -> Float[Tensor, "O I"]:
        """What the codes stand for."""
        return self.codes.to(self.steps.dtype) * self.steps[:, None]

    @property
    def bits(self) -> float:
        """Per weight, without steps."""
        return 4 + 4 * float(self.eight.double().mean())


def row_gain(weight: Float[Tensor, "O I"], gram: Float[Tensor, "I I"], *, step: Step = "weighted") -> Float[Tensor, "O"]:
    """e_r: by how much a row's squared output error falls if it gets eight bits instead of four; may be negative, as on a grid of four bits.

    Args:
        weight: [O, I].
        gram: XXᵀ over tokens, [I, I].
        step: How steps are chosen.
    """
    return _gain(weight, gram, _both_widths(weight, gram, step))


def choose_rows(gain: Float[Tensor, "O"], share: float) -> Bool[Tensor, "O"]:
    """The rows that get eight bits: ⌊share·O + ½⌋ of the largest gains, of equal ones the first, and none that would lose.

    Raises:
        Problem: If the share is none.
    """
    if not 0 <= share <= 1:
        raise Problem(
            f"{share} is no share of rows.", why="it is from 0, all rows of four bits, to 1.", fix="`0.5` for half of them."
        )
    count = int(share * len(gain) + 0.5)
    chosen = torch.zeros_like(gain, dtype=torch.bool)
    chosen[gain.argsort(descending=True, stable=True)[:count]] = True
    return chosen & (gain > 0)


def mix_rows(weight: Float[Tensor, "O I"], gram: Float[Tensor, "I I"], share: float, *, step: Step = "weighted") -> MixedRows:
    """Rounds a matrix to nearest, a share of its rows to eight bits and the others to four.

    Args:
        weight: [O, I].
        gram: XXᵀ over tokens, [I, I].
        share: Of the rows.
        step: How steps are chosen.

    Raises:
        Problem: On shapes or a share that do not fit.
    """
    check_shapes(weight, gram)
    parts = _both_widths(weight, gram, step)
    eight = choose_rows(_gain(weight, gram, parts), share)
    codes, steps = (
        torch.where(eight if each[0].ndim == 1 else eight[:, None], each[1], each[0]) for each in zip(*parts, strict=True)
    )
    return MixedRows(codes.to(torch.int8), steps, eight)


def integer_product(
    mixed: MixedRows, inputs: Int[Tensor, "... I"], input_step: float, bias: Float[Tensor, "O"] | None = None
) -> Float[Tensor, "... O"]:
    """The reference: sums of products of whole numbers, then one step per row, in float32."""
    sums = inputs.long() @ mixed.codes.long().T
    return _rescaled(sums.float(), mixed, input_step, bias)


def code_product(
    mixed: MixedRows, inputs: Int[Tensor, "... I"], input_step: float, bias: Float[Tensor, "O"] | None = None
) -> Float[Tensor, "... O"]:
    """The same bit for bit by an ordinary product of float32, whose sums of codes are exact in any order.

    Raises:
        Problem: If so many inputs of so many bits could leave what float32 counts exactly.
    """
    most = int(inputs.long().abs().max()) * 128 * inputs.shape[-1]
    if most > EXACT:
        raise Problem(
            f"Sums of {inputs.shape[-1]} products up to {most:,} are not exact in float32.",
            why=f"it counts whole numbers up to {EXACT:,}.",
            fix="`integer_product`, or inputs of fewer bits.",
        )
    return _rescaled(inputs.float() @ mixed.codes.float().T, mixed, input_step, bias)


def _rescaled(sums: Tensor, mixed: MixedRows, input_step: float, bias: Tensor | None) -> Tensor:
    found = sums * (mixed.steps.float() * input_step)
    return found if bias is None else found + bias.float()


def _both_widths(weight: Tensor, gram: Tensor, step: Step) -> list[tuple[Tensor, Tensor]]:
    """Codes [O, I] and steps [O] of the matrix with all rows of four bits, and of eight."""
    found = []
    for grid in (FOUR, EIGHT):
        steps, _ = choose_steps(weight, grid, step, gram.diagonal())
        found.append((encode(weight, steps, None, grid), steps[:, 0]))
    return found


def _gain(weight: Tensor, gram: Tensor, parts: list[tuple[Tensor, Tensor]]) -> Float[Tensor, "O"]:
    four, eight = (_error(weight, codes * steps[:, None], gram) for codes, steps in parts)
    return four - eight


def _error(weight: Tensor, rounded: Tensor, gram: Tensor) -> Float[Tensor, "O"]:
    """Squared output error of every row."""
    apart = weight - rounded
    return ((apart @ gram.to(apart.dtype)) * apart).sum(1)
