"""Wanda-sp: magnitude times input norm, averaged over the outputs and summed over the columns of a unit; no gradients.

The structured form of Wanda (arXiv 2306.11695) that FLAP (arXiv 2312.11983) compares with: a baseline, and a good one where gradients are
too dear.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from duramen.calibrate.walker import Records, Walk
from duramen.families.model import BlockModel, Model
from duramen.registry import method
from duramen.shrink.activation import activation_scores
from duramen.shrink.allocate import Scores
from duramen.shrink.groups import Units
from duramen.shrink.importance import wanda_sp
from duramen.shrink.model import ShrinkSettings, shrink_model


class Settings(ShrinkSettings):
    """Settings of Wanda-sp."""


def score(model: BlockModel, units: list[Units], tokens: Tensor, walk: Walk) -> tuple[Scores, dict[str, Any]]:
    """Importance of all units."""
    scores = activation_scores(
        model, units, tokens, walk,
        lambda weight, moments: wanda_sp(weight, moments.second.diagonal().float()),
        lambda _, columns: columns.sum(1),
    )  # fmt: skip
    return scores, {}


@method("wanda_sp", title="Wanda-sp", paper="arXiv 2306.11695", kind="shrink", settings=Settings)
def apply(model: Model, tokens: Tensor, *, walk: Walk | None = None, **settings: object) -> Records:
    """Cuts the units with the least score; see ``shrink_model``."""
    return shrink_model(score, "wanda_sp", model, tokens, Settings.model_validate(settings), walk=walk)
