"""Nested orders of a layer's units, and the weights and the error of every level from one Cholesky factor.

A *level* keeps the first k units of an order. The order is found from the end: the unit whose loss is least once the others have
made up for it leaves, again and again (optimal brain surgeon for groups, as in ZipLM, arXiv 2302.04089). Our derivation: with the
columns in this order, H = LLᵀ and V = WL, keeping the first k columns and moving them to their optimum gives
Ŵ = V[:, :k] (L[:k, :k])⁻¹, and its damped error is Σ ‖V_j‖² over the columns behind k. So all levels share one factor, and nothing drifts.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from duramen.prune.factor import DOUBLE_UP_TO

ROUNDS = 64
"""Into so many rounds the removal of many small units is divided; large ones leave one by one."""


def removal_losses(weight: Float[Tensor, "O I"], inverse: Float[Tensor, "I I"], size: int) -> Float[Tensor, "U"]:
    """½ tr(W_u (K_uu)⁻¹ W_uᵀ): what the loss rises by when a unit leaves and the others move to their optimum.

    Args:
        weight: [O, I], the columns of a unit side by side.
        inverse: K, the inverse of the damped Gram, [I, I].
        size: Columns of a unit, I/U.
    """
    if size == 1:
        return 0.5 * weight.square().sum(0) / inverse.diagonal()
    units = len(inverse) // size
    own = inverse.reshape(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    parts = weight.T.reshape(units, size, -1)
    solved: Tensor = torch.linalg.solve(own, parts)
    return 0.5 * (parts * solved).sum((1, 2))


def greedy_order(
    weight: Float[Tensor, "O I"], inverse: Float[Tensor, "I I"], *, size: int = 1, per_round: int = 1
) -> tuple[list[int], Float[Tensor, "U"]]:
    """The nested order of the units, the most important first.

    Units that leave in one round do not know of one another, which does little harm among many small ones; heads must leave one by
    one, since two that stand in for each other would go together.

    Args:
        weight: [O, I], the columns of a unit side by side.
        inverse: K, the inverse of the damped Gram, [I, I].
        size: Columns of a unit.
        per_round: Units that leave at a time.

    Returns:
        All units, the last to leave first; and in the same order what the loss rose by when each left, as its round saw it.
    """
    kind = torch.float64 if len(inverse) <= DOUBLE_UP_TO else inverse.dtype
    weight, inverse = weight.to(kind), inverse.to(kind)
    left = torch.arange(len(inverse) // size, device=inverse.device)
    gone, rises = [], []
    while len(left):
        losses = removal_losses(weight, inverse, size)
        leave = losses.argsort(stable=True)[:per_round]
        gone.append(left[leave])
        rises.append(losses[leave])
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stays[leave] = False
        columns = stays.repeat_interleave(size)
        towards = torch.linalg.solve(inverse[~columns][:, ~columns], inverse[~columns][:, columns])
        weight = weight[:, columns] - weight[:, ~columns] @ towards
        inverse = inverse[columns][:, columns] - inverse[columns][:, ~columns] @ towards
        left = left[stays]
    return torch.cat(gone).flip(0).tolist(), torch.cat(rises).flip(0)


def columns_of(order: list[int], size: int) -> Tensor:
    """The columns of units in this order, [I]."""
    return (torch.tensor(order, dtype=torch.long)[:, None] * size + torch.arange(size)).flatten()


def level_factor(
    weight: Float[Tensor, "O I"], hessian: Float[Tensor, "I I"], columns: Tensor
) -> tuple[Float[Tensor, "O I"], Float[Tensor, "I I"]]:
    """V = WL and L of H = LLᵀ, the columns in the given order.

    Args:
        weight: [O, I].
        hessian: Damped Gram, [I, I].
        columns: Order of the columns, those kept longest first, [I].
    """
    kind = torch.float64 if len(hessian) <= DOUBLE_UP_TO else hessian.dtype
    columns = columns.to(hessian.device)
    lower = torch.linalg.cholesky(hessian[columns][:, columns].to(kind))
    return weight[:, columns].to(kind) @ lower, lower


def level_weight(energy: Float[Tensor, "O I"], lower: Float[Tensor, "I I"], kept: int) -> Float[Tensor, "O k"]:
    """The optimal weights of the first ``kept`` columns, [O, k], from ``level_factor``'s V and L."""
    part = lower[:kept, :kept]
    solved: Tensor = torch.linalg.solve_triangular(part, energy[:, :kept], upper=False, left=False)
    return solved


def error_curve(energy: Float[Tensor, "O I"]) -> Float[Tensor, "I+1"]:
    """tr(ΔW·H·ΔWᵀ) of every level, by how many columns it keeps, from nothing to all; [I + 1]."""
    columns = energy.square().sum(0, dtype=torch.float64)
    return torch.cat([columns.flip(0).cumsum(0).flip(0), columns.new_zeros(1)])
