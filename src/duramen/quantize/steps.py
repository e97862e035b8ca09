"""The step of every row or group of weights: from the largest weight, or the one that a squared error chooses."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from duramen.grids import Grid, encode

Step = Literal["absmax", "mse", "weighted"]
COARSE, FINE = 50, 10
"""How many shares of the largest weight's step are tried, and then around the best."""
LEAST, MOST = 0.2, 1.2


def choose_steps(
    weight: Float[Tensor, "O I"], grid: Grid, kind: Step = "weighted", importance: Float[Tensor, "I"] | None = None
) -> tuple[Float[Tensor, "O n"], Float[Tensor, "O n"] | None]:
    """Chooses the steps, and the codes of zero of an affine grid.

    Args:
        weight: The weights.
        grid: The grid.
        kind: ``absmax`` fits the largest weight (or the range); ``mse`` takes the share of that, between 0.2 and 1.2, which rounds with the least squared error, and
            ``weighted`` that which does with the error of every input weighted by its importance.
        importance: Of the inputs, such as the diagonal of the Gram.

    Returns:
        α, 1 where all weights are zero; and codes of zero as floats, or None.
    """
    outputs, inputs = weight.shape
    width = grid.width(inputs)
    parts = weight.reshape(1, 1, -1) if grid.share == "tensor" else weight.view(outputs, -1, width)
    low, high = parts.amin(-1).clamp_max(0), parts.amax(-1).clamp_min(0)
    whole = (high - low) / (grid.most - grid.least) if grid.affine else torch.maximum(-low, high) / grid.most
    whole = torch.where(whole > 0, whole, torch.ones_like(whole))
    zeros = (-low / whole).round().clamp(0, grid.most) if grid.affine else None
    whole = whole.expand(outputs, -1).contiguous()
    zeros = None if zeros is None else zeros.expand(outputs, -1).contiguous()
    if kind == "absmax":
        return whole, zeros
    weights = torch.ones_like(weight[0]) if kind == "mse" or importance is None else importance.to(weight.dtype)
    return _searched(weight, grid, whole, zeros, weights), zeros


def _searched(weight: Tensor, grid: Grid, whole: Tensor, zeros: Tensor | None, weights: Tensor) -> Tensor:
    """The share of the whole steps with the least weighted error, for every row and group, or for the whole matrix where that shares a step."""

    def loss(share: Tensor) -> Tensor:
        steps = whole * share
        rounded = encode(weight, steps, zeros, grid).view(*steps.shape, -1) * steps[:, :, None]
        found = ((weight.view_as(rounded) - rounded).square() * weights.view(steps.shape[1], -1)).sum(-1)
        return found.sum().expand_as(found) if grid.share == "tensor" else found

    def least(shares: list[Tensor]) -> Tensor:
        best, chosen = torch.full_like(whole, torch.inf), torch.ones_like(whole)
        for share in shares:
            found = loss(share)
            chosen, best = torch.where(found < best, share, chosen), torch.minimum(found, best)
        return chosen

    apart = (MOST - LEAST) / (COARSE - 1)
    coarse = least([torch.ones_like(whole), *(torch.full_like(whole, LEAST + number * apart) for number in range(COARSE))])
    return whole * least([coarse, *(coarse + (2 * number / FINE - 1) * apart for number in range(FINE + 1))])


def of_every_weight(
    steps: Float[Tensor, "O n"], zeros: Float[Tensor, "O n"] | None, inputs: int
) -> tuple[Float[Tensor, "O I"], Float[Tensor, "O I"]]:
    """The step and the code of zero of every weight."""
    times = inputs // steps.shape[1]
    zero = torch.zeros_like(steps) if zeros is None else zeros
    return steps.repeat_interleave(times, 1), zero.repeat_interleave(times, 1)


def rounded_to(steps: Tensor, kind: torch.dtype) -> Tensor:
    """Steps as they will be stored, never zero."""
    least = torch.finfo(kind).tiny * (torch.finfo(kind).eps if kind == torch.float16 else 1)  # its normal numbers end at 6e-5
    return steps.to(kind).clamp_min(least).to(steps.dtype)
