"""SparseGPT: one column at a time, masks chosen block by block, the columns to the right make up for each removal.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot", arXiv 2301.00774,
Algorithm 1. The score w²/U_jj² is the loss of removing a weight when all columns to its left are frozen. We differ from the
public code in three ways: counts are exact, a dead input is not zeroed blindly, and a group that straddles two blocks of
columns is chosen when its own first column is reached.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from duramen.calibrate.walker import Records, Walk
from duramen.families.model import Model
from duramen.prune.compensate import Swept, sweep
from duramen.prune.factor import Factor, factorise
from duramen.prune.layer import Damping
from duramen.prune.model import PruneSettings, prune_model
from duramen.prune.pattern import Pattern, lasting_zeros, lowest, parse_pattern, select
from duramen.prune.pruned import Pruned, finish
from duramen.prune.reconstruct import check_shapes, compute_dtype
from duramen.registry import method


class Settings(PruneSettings):
    """Settings of SparseGPT."""

    block: int = Field(default=128, ge=1)
    """Columns that share one quota and one choice of mask."""
    damping: Damping = 0.01
    """λ as a share of the mean diagonal of the Gram; `held-out` chooses it on held-out sequences."""

    @property
    def products(self) -> int:
        """One sweep, which is slower than its arithmetic."""
        return 4


def sweep_mask(weight: Float[Tensor, "O I"], factor: Factor, target: Pattern, block: int) -> Swept:
    """Chooses the mask of Algorithm 1 and compensates with freeze width 1.

    Args:
        weight: [O, I], in the dtype of the factor. Zeros go first.
        factor: Damped Gram of the inputs.
        target: What to remove.
        block: Quota width in columns; for N:M each group is chosen when its first column is reached.
    """
    zeros, diagonal = weight == 0, factor.upper.diagonal().square()
    stay = lasting_zeros(weight) if target.grouped else torch.zeros_like(zeros)  # a group may have more than the pattern takes
    chosen = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    step = target.group if target.grouped else block

    def choose(work: Tensor, start: int, stop: int) -> Tensor:
        if start % step == 0:
            end = min(start + step, work.shape[1])
            scores = (work[:, start:end].square() / diagonal[start:end]).masked_fill(zeros[:, start:end], -1)
            chosen[:, start:end] = block_mask(scores, target, start) | stay[:, start:end]
        return chosen[:, start:stop]

    lazy = block - block % step if block >= step else step
    return sweep(weight, factor, choose, width=1, lazy=lazy)


def block_mask(scores: Float[Tensor, "O f"], target: Pattern, start: int) -> Bool[Tensor, "O f"]:
    """The exact share of one block of columns, [O, f]; block counts add up to the exact count of the matrix."""
    if target.grouped:
        return select(scores, target)
    outputs, stop = scores.shape[0], start + scores.shape[1]
    count = target.quota(outputs * stop) - target.quota(outputs * start)
    return lowest(scores.reshape(1, -1), count).reshape(scores.shape)


def prune(
    weight: Tensor,
    gram: Tensor,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    damping: float = 0.01,
    block: int = 128,
    factor: Factor | None = None,
) -> Pruned:
    """Prunes by Algorithm 1 of SparseGPT.

    Args:
        weight: [O, I].
        gram: XXᵀ over tokens, [I, I].
        sparsity: Share to remove, in [0, 1); or
        pattern: ``"kept:group"``.
        damping: λ as a share of the mean diagonal of the Gram.
        block: Columns that share one quota.
        factor: The Gram with this damping, factorised, where the caller has it already.

    Raises:
        Problem: On shapes or settings that do not fit.
    """
    check_shapes(weight, gram)
    target = parse_pattern(sparsity, pattern)
    factor = factor or factorise(gram, damping, dtype=compute_dtype(weight))
    swept = sweep_mask(weight.to(factor.upper.dtype), factor, target, block)
    return finish(weight, swept.weight, swept.pruned, gram, damping=factor.damping)


@method("sparsegpt", title="SparseGPT", paper="arXiv 2301.00774", kind="prune", settings=Settings)
def apply(model: Model, tokens: Tensor, *, walk: Walk | None = None, **settings: object) -> Records:
    """Prunes every linear weight of the model's blocks; see ``prune_model``."""
    return prune_model(prune, model, tokens, Settings.model_validate(settings), walk=walk)
