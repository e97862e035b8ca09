"""Wanda: weights times input norms decide, row by row, and nothing compensates.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695. Their score
|w|·‖x_j‖ orders like its square w²·G_jj, which is what we rank.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from duramen.calibrate.walker import Records, Walk
from duramen.families.model import Model
from duramen.prune.model import PruneSettings, prune_model
from duramen.prune.pattern import keep_existing_zeros, parse_pattern, select
from duramen.prune.pruned import Pruned, finish
from duramen.prune.reconstruct import check_shapes, compute_dtype
from duramen.registry import method


class Settings(PruneSettings):
    """Settings of Wanda."""

    scope: Literal["row", "layer"] = "row"
    """Rank within each row (as published), or over the whole matrix."""


def score(weight: Float[Tensor, "O I"], second_moment: Float[Tensor, "I"]) -> Float[Tensor, "O I"]:
    """w²·G_jj, [O, I], for the diagonal of the Gram matrix, [I]."""
    dtype = compute_dtype(weight)
    return weight.to(dtype).square() * second_moment.to(dtype)


def prune(
    weight: Tensor,
    gram: Tensor,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    scope: Literal["row", "layer"] = "row",
) -> Pruned:
    """Removes the weights with the smallest |w|·‖x_j‖.

    Args:
        weight: [O, I].
        gram: XXᵀ over tokens, [I, I].
        sparsity: Share to remove, in [0, 1); or
        pattern: ``"kept:group"``.
        scope: Rank within each row, or over the matrix.

    Raises:
        Problem: On shapes or settings that do not fit.
    """
    check_shapes(weight, gram)
    target = parse_pattern(sparsity, pattern)
    scores = keep_existing_zeros(score(weight, gram.diagonal()), weight, target)
    return finish(weight, weight, select(scores, target, scope=scope), gram)


@method("wanda", title="Wanda", paper="arXiv 2306.11695", kind="prune", settings=Settings)
def apply(model: Model, tokens: Tensor, *, walk: Walk | None = None, **settings: object) -> Records:
    """Prunes every linear weight of the model's blocks; see ``prune_model``."""
    return prune_model(prune, model, tokens, Settings.model_validate(settings), walk=walk)
