"""Which steps to run in full for a pipeline, found by running it: no fixed rule is best everywhere, so each is tried on seeds of its own, and even steps, which are plain fewer steps, stay unless another is measurably nearer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from duramen.intervals import paired_interval
from duramen.problem import Problem
from duramen.video.rehash import Rehash, course_of
from duramen.video.schedules import check_count, optimal_schedule, reuse_cost, similarity, threshold_for, uniform_schedule

EVEN, EQUAL = "even", 240.0
"""Plain fewer steps, and the decibels of what is equal."""


@dataclass(frozen=True)
class Choice:
    """What calibration found.

    Attributes:
        name: Of the schedule that was chosen; ``even`` where none is measurably nearer than plain fewer steps.
        full: Its full steps.
        order: 0 keeps predictions, 1 carries them on.
        errors: Root mean square distance from the full run on every seed that chose, by schedule.
        quality: Decibels that the full run stands above the distance of the chosen one from it, in the mean over those seeds.
    """

    name: str
    full: list[int]
    order: int
    errors: dict[str, list[float]]
    quality: float


@torch.no_grad()
def predictions(pipeline: Any, generate: Callable[[int], Tensor], steps: int, seeds: Sequence[int]) -> Float[Tensor, "K R D"]:
    """What the denoiser says at every step of full runs, as noise or velocity.

    Args:
        pipeline: As for ``choose_schedule``.
        generate: Likewise.
        steps: Of a run.
        seeds: Of the runs.
    """
    recorded: list[list[Tensor]] = [[] for _ in range(steps)]
    with Rehash(pipeline, range(steps), steps, record=lambda step, found: recorded[step].append(found.flatten().float().cpu())):
        for seed in seeds:
            generate(seed)
    return torch.stack([torch.stack(each) for each in recorded])


def candidates(pipeline: Any, learned: Float[Tensor, "K R D"], count: int) -> dict[str, tuple[list[int], int]]:
    """Every kind of schedule with so many full steps, and its order: 0 keeps predictions, 1 carries them on.

    Args:
        pipeline: Whose scheduler's steps are set.
        learned: Of ``predictions``.
        count: Full steps.
    """
    schedules = {
        EVEN: uniform_schedule(len(learned), count),
        "threshold": threshold_for(similarity(learned), count),
        "solver": optimal_schedule(reuse_cost(learned, course_of(pipeline.scheduler).weights), count)[0],
    }
    return {name if not order else f"{name}, carried on": (full, order) for name, full in schedules.items() for order in (0, 1)}


@torch.no_grad()
def choose_schedule(
    pipeline: Any,
    generate: Callable[[int], Tensor],
    steps: int,
    count: int | None = None,
    *,
    quality: float | None = None,
    learn: Sequence[int],
    choose: Sequence[int],
) -> Choice:
    """Learns schedules on some seeds and chooses among them on others.

    Args:
        pipeline: Of diffusers, with a scheduler of first order.
        generate: Seed -> what the pipeline makes of it in so many steps, latents or frames.
        steps: Of a full run.
        count: Full steps that may be taken; or
        quality: Decibels that the full run must stand above the distance from it, in the mean over the seeds that choose; the fewest steps with it are found by halving.
        learn: Seeds whose predictions decide the schedules.
        choose: Other seeds, at least two, on which they are compared with full runs.

    Raises:
        Problem: If seeds are shared or too few, the count cannot be, or both or neither of count and quality are given.
    """
    if (count is None) == (quality is None):
        raise Problem("Either a number of steps or a quality says how many run in full.", why="each follows from the other.", fix="one of them.")  # fmt: skip
    if count is not None:
        check_count(steps, count)
    if len(choose) < 2 or not learn or set(learn) & set(choose):
        raise Problem(
            "These seeds cannot choose a schedule.", why="one that chooses must not have learned, and an interval needs two.", fix="`learn=[0, 1], choose=[2, 3, 4]`"
        )  # fmt: skip
    trials = _Trials(
        pipeline,
        generate,
        steps,
        predictions(pipeline, generate, steps, learn),
        {seed: generate(seed).double() for seed in choose},
    )
    if count is not None:
        return trials.best(count)
    low, high, found = 2, steps, Choice(EVEN, list(range(steps)), 0, {EVEN: [0.0] * len(choose)}, EQUAL)
    while low < high:
        here = trials.best((low + high) // 2)
        if here.quality >= quality:  # type: ignore[operator]
            found, high = here, (low + high) // 2
        else:
            low = (low + high) // 2 + 1
    return found


@dataclass(frozen=True)
class _Trials:
    """Full runs, with which schedules are compared."""

    pipeline: Any
    generate: Callable[[int], Tensor]
    steps: int
    learned: Tensor
    whole: dict[int, Tensor]

    def best(self, count: int) -> Choice:
        """Of all schedules with so many full steps."""
        tried = candidates(self.pipeline, self.learned, count)
        errors: dict[str, list[float]] = {}
        for name, (full, order) in tried.items():
            with Rehash(self.pipeline, full, self.steps, order=order):
                errors[name] = [
                    float((self.generate(seed).double() - whole).square().mean().sqrt()) for seed, whole in self.whole.items()
                ]
        best = min(errors, key=lambda name: float(np.mean(errors[name])))
        gain = paired_interval(np.array(errors[EVEN]), np.array(errors[best]))
        name = best if gain.high < 0 else EVEN
        return Choice(name, *tried[name], errors, self._quality(errors[name]))

    def _quality(self, errors: list[float]) -> float:
        sizes = [float(whole.square().mean().sqrt()) for whole in self.whole.values()]
        above = [20 * math.log10(size / max(error, 1e-12 * size)) for size, error in zip(sizes, errors, strict=True)]
        return float(np.mean(above))
