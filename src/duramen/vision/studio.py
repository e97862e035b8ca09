"""What the steps of a recipe of images work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from duramen.calibrate.walker import Memo
from duramen.problem import Problem
from duramen.vision.images import Images


@dataclass
class Studio:
    """What a step works with.

    Attributes:
        network: The model so far; None before one was made.
        dense: The model before patches left; None while that is the model itself.
        train: Images to learn from.
        aside: Images that decide which checkpoint is best.
        test: Images to measure on.
        memo: Keeps finished parts.
        folder: Where checkpoints are kept.
        out: Where the run's outcome goes.
        told: Called with (steps done, held-out loss).
        workers: Ray workers that measure the candidates of a search; 0 for this process alone.
        address: Ray cluster that they belong to; empty for this machine.
    """

    network: nn.Module | None
    dense: nn.Module | None
    train: Images
    aside: Images
    test: Images
    memo: Memo
    folder: Path
    out: Path
    told: Callable[[int, float], None] = field(default=lambda step, loss: None)
    workers: int = 0
    address: str = ""

    @property
    def model(self) -> Any:
        """The model so far.

        Raises:
            Problem: If there is none.
        """
        if self.network is None:
            raise Problem(
                "There is no model yet.",
                why="the recipe begins with `new`.",
                fix="a step `train_images` first, or a model's folder.",
            )
        return self.network
