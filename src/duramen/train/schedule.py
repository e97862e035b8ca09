"""How long and how fast a model is trained: the learning rate of every step, and the rows that it sees."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from duramen.train.order import sample_index

Shape = Literal["linear", "cosine", "wsd"]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: How many.
        batch: Sequences of a step, over all processes.
        at_once: Sequences that run together; the gradients of a step's parts add up.
        warmup: Share of the steps in which the rate rises; then it falls.
        clip: Largest norm of a step's gradient.
        every: Steps between checkpoints, at which the held-out loss is taken.
        seed: Of the order of the sequences.
        shape: Of the fall: a line, half a cosine, or none until ``decay`` before the end and then that of 1 − √u (warm-up, stable, decay).
        floor: Share of the full rate at which the fall ends, right after the last step.
        decay: Share of the steps in which the rate of ``wsd`` falls.
        best: Whether the parameters are those of the least held-out loss in the end, and not the last.
        skip: Whether a step is left out whose loss or gradient is far above those before it.
        keep: Checkpoints that are kept; the last ones.
        milestones: Steps between those that are kept for good; 0 for none.
    """

    steps: int
    batch: int = 8
    at_once: int = 8
    warmup: float = 0.1
    clip: float = 1.0
    every: int = 10
    seed: int = 0
    shape: Shape = "linear"
    floor: float = 0.0
    decay: float = 0.2
    best: bool = True
    skip: bool = False
    keep: int = 1
    milestones: int = 0

    def rate(self, step: int) -> float:
        """The share of the full learning rate at a step, from 0: a straight rise from zero, then the fall to the floor."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return (step + 1) / rise
        start = rise if self.shape != "wsd" else max(rise, self.steps - max(1, round(self.decay * self.steps)))
        gone = max(0, step - start) / max(1, self.steps - start)
        left = {"linear": 1 - gone, "cosine": (1 + math.cos(math.pi * gone)) / 2, "wsd": 1 - math.sqrt(gone)}[self.shape]
        return self.floor + (1 - self.floor) * left

    def sequences(self, step: int, count: int) -> list[int]:
        """What a step sees: every epoch is a new order of all sequences."""
        places = (divmod(position, count) for position in range(step * self.batch, (step + 1) * self.batch))
        return [sample_index(self.seed, epoch, place, count) for epoch, place in places]
