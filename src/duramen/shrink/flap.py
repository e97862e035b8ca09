"""FLAP: units whose activation fluctuates least leave, and a bias stands for their mean.

An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", arXiv 2312.11983 (WIFV metric, AL-AM structure, bias
compensation). A baseline: the public code loses the first sequence's fluctuation and has the width of a head built in; ours has neither.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from duramen.calibrate.walker import Records, Walk
from duramen.families.model import BlockModel, Model
from duramen.registry import method
from duramen.shrink.activation import activation_scores
from duramen.shrink.allocate import Allocation, Scores
from duramen.shrink.groups import Units
from duramen.shrink.importance import flap
from duramen.shrink.model import ShrinkSettings, shrink_model
from duramen.shrink.reform import Repair


class Settings(ShrinkSettings):
    """Settings of FLAP."""

    allocation: Allocation = "flap"
    """The same share in every block (`local`), the least important of the whole model (`global`), or that after standardising (`flap`)."""
    repair: Repair = "bias"
    """What makes up for the cut in the projections that read it: their bias, their other columns (`reform`), both (`affine`), or nothing."""


def score(model: BlockModel, units: list[Units], tokens: Tensor, walk: Walk) -> tuple[Scores, dict[str, Any]]:
    """Importance of all units: of a channel its fluctuation, of a head the mean of its squares."""
    scores = activation_scores(
        model, units, tokens, walk,
        lambda weight, moments: flap(weight, (moments.about(moments.mean).diagonal() / moments.count).float()),
        lambda units, columns: columns.sum(1) if units.kind == "ffn_channel" else columns.square().mean(1),
    )  # fmt: skip
    return scores, {}


@method("flap", title="FLAP", paper="arXiv 2312.11983", kind="shrink", settings=Settings)
def apply(model: Model, tokens: Tensor, *, walk: Walk | None = None, **settings: object) -> Records:
    """Cuts the units with the least score; see ``shrink_model``."""
    return shrink_model(score, "flap", model, tokens, Settings.model_validate(settings), walk=walk)
