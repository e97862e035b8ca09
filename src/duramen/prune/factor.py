"""The one factorisation that every pruning step of a layer shares.

``H = G + λ·Id = R Rᵀ`` with R upper triangular, by a Cholesky factorisation of H with rows and columns reversed; then
``U = R⁻¹`` gives ``K = H⁻¹ = UᵀU`` and, for every split point a, the inverse of the trailing block:
``(H[a:, a:])⁻¹ = U[a:, a:]ᵀ U[a:, a:]``. So no step needs a second factorisation (method sheet of arXiv 2410.15567, 2.6).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from duramen.finite import all_finite
from duramen.problem import Exit, Problem

BLOCK = 512
"""Columns of K that are computed at a time."""
DOUBLE_UP_TO = 4096
"""Widest Gram matrix that is factorised in float64; wider ones in float32."""
AT_ONCE = 128
"""Columns of a triangular matrix that are inverted at once."""


@dataclass(frozen=True)
class Factor:
    """A damped Gram matrix and the triangular factor of its inverse.

    Attributes:
        hessian: ``G + λ·Id``, [I, I].
        upper: U, upper triangular, with ``inverse == U.T @ U``, [I, I].
        damping: λ as a share of the mean diagonal of G; larger than asked if the factorisation needed it.
        dead: Inputs that were zero on every token, bool [I].
    """

    hessian: Float[Tensor, "I I"]
    upper: Float[Tensor, "I I"]
    damping: float
    dead: Bool[Tensor, "I"]

    @cached_property
    def inverse(self) -> Float[Tensor, "I I"]:
        """K = H⁻¹, [I, I]; a third of a whole product, since U is triangular and K symmetric."""
        inverse = torch.empty_like(self.upper)
        for start in range(0, len(self.upper), BLOCK):
            stop = start + BLOCK
            part = self.upper[:stop, start:stop].T @ self.upper[:stop, start:]
            inverse[start:stop, start:] = part
            inverse[start:, start:stop] = part.T
        return inverse

    def trailing(self, start: int, stop: int) -> Float[Tensor, "f f"]:
        """Block [start:stop] of the inverse with all columns before ``start`` frozen, [f, f]."""
        block = self.upper[start:stop, start:stop]
        return block.T @ block


def factorise(gram: Tensor, damping: float = 0.01, *, dtype: torch.dtype = torch.float32) -> Factor:
    """Damps and factorises a Gram matrix; on failure tries ten times the damping, three times.

    Args:
        gram: XXᵀ over tokens at any positive scale, [I, I], symmetric.
        damping: λ as a share of the mean diagonal, at least 0.
        dtype: Type of the returned tensors; the factorisation itself runs in float64 up to width 4096.

    Raises:
        Problem: If the Gram is not finite, or not positive definite with the last damping tried.
    """
    _check(gram, damping)
    work = gram.to(torch.float64 if gram.shape[0] <= DOUBLE_UP_TO else torch.float32)
    diagonal = work.diagonal()
    mean = float(diagonal.mean()) or 1.0
    used = damping
    for attempt in (damping, *(max(damping, 1e-6) * 10**power for power in (1, 2, 3))):
        used = attempt if float(diagonal.sum()) else 1.0
        hessian = work.clone()
        hessian.diagonal().add_(used * mean)
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not failed:
            return Factor(hessian.to(dtype), _inverse(lower.flip(0, 1)).to(dtype), used, diagonal == 0)
    raise Problem(
        f"The Gram matrix ({len(work)} inputs) is not positive definite even with damping {used:g}.",
        why="too few calibration tokens for this many inputs, or activations that overflow.",
        fix="more calibration tokens, or a larger `damping`.",
        code=Exit.CHECK_FAILED,
    )


def _inverse(upper: Float[Tensor, "I I"]) -> Float[Tensor, "I I"]:
    """Of an upper triangular matrix, in halves, which leaves the zeros below the diagonal out of the products."""
    size = len(upper)
    if size <= AT_ONCE:
        whole: Tensor = torch.linalg.solve_triangular(
            upper, torch.eye(size, dtype=upper.dtype, device=upper.device), upper=True
        )
        return whole
    half, found = size // 2, torch.zeros_like(upper)
    found[:half, :half], found[half:, half:] = _inverse(upper[:half, :half]), _inverse(upper[half:, half:])
    found[:half, half:] = -found[:half, :half] @ upper[:half, half:] @ found[half:, half:]
    return found


def _check(gram: Tensor, damping: float) -> None:
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise Problem(
            f"`gram` must be square [I, I], got {tuple(gram.shape)}.",
            why="it is x xᵀ summed over tokens, one row and column per input.",
            fix="`gram = x @ x.T` for x of shape [I, tokens].",
        )
    if not all_finite(gram):
        raise Problem(
            "`gram` holds NaN or infinite values.",
            why="an activation overflowed, or the model's weights are not finite.",
            fix="run the forward pass in float32, or check the model with `duramen inspect`.",
            code=Exit.CHECK_FAILED,
        )
    if damping < 0:
        raise Problem(
            f"`damping` must be at least 0, got {damping}.",
            why="it is added to the diagonal as a share of its mean.",
            fix="a value such as 0.01.",
        )
