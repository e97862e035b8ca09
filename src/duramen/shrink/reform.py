"""Repair: what the kept inputs of an output projection can make up for when others are cut.

A removed row of q, k, v, gate or up leaves an output that is identically zero, which nothing can compensate; a removed column of o
or down is a masked least squares problem like any other, and is solved by the same solver: Ŵ_S = W_S + W_R H_RS (H_SS)⁻¹.
``alternating`` is what "Search for Efficient Large Language Models" (arXiv 2409.17372) does in its place, to compare with.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from duramen.prune.factor import Factor
from duramen.prune.pattern import lasting_zeros
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
    pruned = lasting_zeros(weight)
    pruned[:, columns.to(weight.device)] = True
    if not solve:
        return finish(weight, weight.masked_fill(pruned, 0), pruned, gram)
    found = reconstruct(weight, gram, pruned, damping=damping, factor=factor)
    return finish(weight, found.weight, pruned, gram, error=found.error, damping=found.damping)


def alternating(weight: Tensor, gram: Tensor, columns: Tensor, *, penalty: float = 1.0, iterations: int = 30) -> Tensor:
    """The reformation of arXiv 2409.17372, Eq. 8 to 10, corrected: it comes near to ``reform`` where the penalty suits the Gram's scale.

    B = (XXᵀ + ρ)⁻¹(XXᵀWᵀ + ρ(Z − U)ᵀ)ᵀ; Z is B + U with zeros where columns are cut; U += B − Z. As printed, and in the released code,
    Z has its zeros where columns are *kept*; and the sparse Z is what must be returned, not B.

    Args:
        weight: [O, I].
        gram: XXᵀ over tokens, [I, I]; the result depends on its scale.
        columns: What is cut, [n].
        penalty: ρ.
        iterations: How many; the paper takes 30.

    Returns:
        [O, I].
    """
    gram = gram.to(torch.float64)
    dense = sparse = weight.to(torch.float64)
    lower = torch.linalg.cholesky(gram + penalty * torch.eye(len(gram), dtype=torch.float64, device=gram.device))
    wanted, dual = dense @ gram, torch.zeros_like(dense)
    for _ in range(iterations):
        free = torch.cholesky_solve((wanted + penalty * (sparse - dual)).T, lower).T
        sparse = (free + dual).index_fill(1, columns.to(gram.device), 0)
        dual = dual + free - sparse
    return sparse.to(weight.dtype)
