"""Importance from the inputs of the projections that read the units, by forward passes only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from duramen.calibrate.statistics import Moments, Statistics
from duramen.calibrate.walker import Walk, walk_blocks
from duramen.families.model import BlockModel, Layer
from duramen.shrink.allocate import Scores
from duramen.shrink.groups import Units

Columns = Callable[[Tensor, Moments], Tensor]
"""(weight of a reader [O, I], sums over its inputs) -> a score per input column, [I]."""
ByUnit = Callable[[Units, Tensor], Tensor]
"""(units, scores of their columns [U, columns of one]) -> a score per unit, [U]."""


def activation_scores(
    model: BlockModel, units: list[Units], tokens: Tensor, walk: Walk, columns: Columns, by_unit: ByUnit
) -> Scores:
    """Scores all units from one walk through the model as it is.

    Args:
        model: The model; it stays as it is.
        units: What to score.
        tokens: Calibration token ids, [S, T].
        walk: How to walk.
        columns: Scores the input columns of a reader.
        by_unit: Makes one score of those of a unit.
    """

    def look(_: list[Layer], statistics: Statistics) -> Callable[[Layer], dict[str, Any]]:
        return lambda layer: {"columns": columns(layer.read().float(), statistics.total).tolist()}

    readers = list(dict.fromkeys(each.reader for each in units))
    looking = replace(walk, store=None, progress=lambda record: None)
    seen = {
        record["layer"]: torch.tensor(record["columns"]) for record in walk_blocks(model, tokens, look, readers, walk=looking)
    }
    return {
        (each.block, each.kind): by_unit(each, seen[each.reader][each.columns(range(each.count))].reshape(each.count, -1))
        for each in units
    }
