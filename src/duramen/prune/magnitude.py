"""Magnitude pruning: the smallest weights go, nothing compensates.

The oldest baseline (Han et al., "Learning both Weights and Connections", arXiv 1506.02626, without their retraining).
It ignores the inputs, which is why it collapses on language models; it is here to be compared with.
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
from duramen.prune.reconstruct import check_shapes
from duramen.registry import method


class Settings(PruneSettings):
    """Settings of magnitude pruning."""

    scope: Literal["row", "layer"] = "layer"
    """Rank within each row, or over the whole matrix."""


def score(weight: Float[Tensor, "O I"]) -> Float[Tensor, "O I"]:
    """|w|, [O, I]."""
    return weight.abs().float()


def prune(
    weight: Tensor,
    gram: Tensor,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    scope: Literal["row", "layer"] = "layer",
) -> Pruned:
    """Removes the smallest weights.

    Args:
        weight: [O, I].
        gram: XXᵀ over tokens, [I, I]; only measures the error.
        sparsity: Share to remove, in [0, 1); or
        pattern: ``"kept:group"``.
        scope: Rank within each row, or over the matrix.

    Raises:
        Problem: On shapes or settings that do not fit.
    """
    check_shapes(weight, gram)
    target = parse_pattern(sparsity, pattern)
    pruned = select(keep_existing_zeros(score(weight), weight, target), target, scope=scope)
    return finish(weight, weight, pruned, gram)


@method("magnitude", title="Magnitude pruning", paper="arXiv 1506.02626", kind="prune", settings=Settings)
def apply(model: Model, tokens: Tensor, *, walk: Walk | None = None, **settings: object) -> Records:
    """Prunes every linear weight of the model's blocks; see ``prune_model``."""
    return prune_model(prune, model, tokens, Settings.model_validate(settings), walk=walk)
