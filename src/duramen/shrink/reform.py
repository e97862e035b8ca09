"""Repair: what the kept inputs of an output projection can make up for when others are cut.

A removed row of q, k, v, gate or up leaves an output that is identically zero, which nothing can compensate; a removed column of o
or down is a masked least squares problem like any other, and is solved by the same solver: Ŵ_S = W_S + W_R H_RS (H_SS)⁻¹.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from duramen.prune.factor import Factor
from duramen.prune.pattern import SPARSE_FROM
from duramen.prune.pruned import Pruned, finish
from duramen.prune.reconstruct import reconstruct

Repair = Literal["none", "bias", "reform", "affine"]


def reform(
    weight: Tensor,
    gram: Tensor,
    *,
    columns: Tensor,
    solve: bool = True,
    damping: float = 0.01,
    factor: Factor | None = None,
) -> Pruned:
    """Cuts input columns of a projection, and moves the others to their joint optimum.

    Args:
        weight: [O, I]. If it is sparse already, its zeros stay.
        gram: XXᵀ over tokens at any positive scale, [I, I]; about the mean where a bias makes up for it.
        columns: What is cut, [n].
        solve: Whether the kept columns move.
        damping: λ as a share of the mean diagonal of the Gram.
        factor: The Gram with this damping, factorised, where the caller has it already.
    """
    pruned = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    zeros = weight == 0
    if float(zeros.float().mean()) > SPARSE_FROM:
        pruned |= zeros
    pruned[:, columns.to(weight.device)] = True
    if not solve:
        return finish(weight, weight.masked_fill(pruned, 0), pruned, gram)
    found = reconstruct(weight, gram, pruned, damping=damping, factor=factor)
    return finish(weight, found.weight, pruned, gram, error=found.error, damping=found.damping)
