"""Left-to-right compensation: columns are decided block by block, and the columns still free make up for it.

One routine gives every published variant (method sheet of arXiv 2410.15567, 2.7). With the columns before a frozen, a block
b = [a, a+f) removes its set P by l = w_P (K_bb|PP)⁻¹ and w_{a:} −= l U_bbᵀ U_{b,a:}. Freeze width f = 1 is exactly
SparseGPT's update (arXiv 2301.00774), f = I the exact joint solution. Losses of the blocks add up to ½‖δ‖²_H.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from duramen.prune.factor import Factor
from duramen.prune.pattern import Sparse
from duramen.prune.reconstruct import conjugate_gradients

Choose = Callable[[Tensor, int, int], Tensor]
"""(current weights [O, I], start, stop) -> bool [O, stop − start], True where a weight goes."""

LAZY = 128
"""Columns after which the pending updates reach the rest of the matrix."""
DIRECT_UP_TO = 2e7
"""Work (rows × f³) up to which a block is solved directly."""


@dataclass(frozen=True)
class Swept(Sparse):
    """Weights after one left-to-right pass, and ½‖δ‖²_H per row [O]."""

    loss: Float[Tensor, "O"]


def sweep(weight: Float[Tensor, "O I"], factor: Factor, choose: Choose, *, width: int, lazy: int = LAZY) -> Swept:
    """Goes once over the columns, choosing and compensating ``width`` of them at a time.

    Args:
        weight: [O, I], in the dtype of the factor.
        factor: Damped Gram of the inputs.
        choose: Says which entries of the next columns go; it sees the weights as compensated so far, which are up to date
            from ``start`` to the next multiple of ``lazy``.
        width: Freeze width f.
        lazy: Later columns see the updates this many columns at a time, in whole widths.
    """
    work, inputs = weight.clone(), weight.shape[1]
    pruned = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    loss = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
    lazy = width * max(1, lazy // width)
    for first in range(0, inputs, lazy):
        last = min(first + lazy, inputs)
        pending = torch.zeros(len(weight), last - first, dtype=weight.dtype, device=weight.device)
        for start in range(first, last, width):
            stop = min(start + width, last)
            removed = choose(work, start, stop)
            block = work[:, start:stop].masked_fill(~removed, 0)
            force = _force(block, removed, factor, start, stop)
            loss += 0.5 * (force * block).sum(1)
            update = force @ factor.upper[start:stop, start:stop].T
            work[:, start:last].addmm_(update, factor.upper[start:stop, start:last], alpha=-1)
            work[:, start:stop].masked_fill_(removed, 0)
            pruned[:, start:stop] = removed
            pending[:, start - first : stop - first] = update
        work[:, last:].addmm_(pending, factor.upper[first:last, last:], alpha=-1)
    return Swept(work, pruned, loss)


def _force(
    block: Float[Tensor, "O f"], removed: Bool[Tensor, "O f"], factor: Factor, start: int, stop: int
) -> Float[Tensor, "O f"]:
    """L = w_P (K_bb|PP)⁻¹ scattered to the block, [O, f]; ``block`` is zero off P."""
    matrix = factor.trailing(start, stop)
    if stop - start == 1:
        return block / matrix
    if len(block) * (stop - start) ** 3 <= DIRECT_UP_TO:
        pair = removed[:, :, None] & removed[:, None, :]
        systems = matrix.expand(len(block), -1, -1).masked_fill(~pair, 0)
        systems.diagonal(dim1=1, dim2=2).add_((~removed).to(matrix.dtype))
        solved: Tensor = torch.linalg.solve(systems, block[:, :, None])
        return solved[:, :, 0]
    return _force_iteratively(block, removed, matrix)


def _force_iteratively(
    block: Float[Tensor, "O f"], removed: Bool[Tensor, "O f"], matrix: Float[Tensor, "f f"]
) -> Float[Tensor, "O f"]:
    """The same by conjugate gradients; the starting loss is bounded by half of ρ, which is all that the stop needs."""
    inverse = torch.linalg.inv(matrix.to(torch.float64)).to(matrix.dtype)
    bound = 0.5 * (((block @ inverse) * removed) * block).sum(1)
    found = conjugate_gradients(block, matrix, inverse, removed.to(block.dtype), loss=bound, tolerance=1e-6, max_iterations=200)
    return found.solution


def compensate(
    weight: Float[Tensor, "O I"], pruned: Bool[Tensor, "O I"], factor: Factor, width: int
) -> tuple[Float[Tensor, "O I"], Float[Tensor, "O"]]:
    """Compensates a given mask with freeze width f.

    Args:
        weight: [O, I], in the dtype of the factor.
        pruned: bool [O, I].
        factor: Damped Gram of the inputs.
        width: 1 is SparseGPT's compensation, I the exact joint one.

    Returns:
        The weights [O, I] and ½‖δ‖²_H per row [O].
    """
    swept = sweep(weight, factor, lambda _, start, stop: pruned[:, start:stop], width=width)
    return swept.weight, swept.loss
