"""Which steps to run in full for a pipeline, found by running it: no fixed rule is best everywhere, so each is tried on seeds of its own, and even steps, which are plain fewer steps, stay unless another is measurably nearer."""

from __future__ import annotations

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

EVEN = "even"


@dataclass(frozen=True)
class Choice:
    """What calibration found.

    Attributes:
        name: Of the schedule that was chosen; ``even`` where none is measurably nearer than plain fewer steps.
        full: Its full steps.
        order: 0 keeps predictions, 1 carries them on.
        errors: Root mean square distance from the full run on every seed that chose, by schedule.
    """

    name: str
    full: list[int]
    order: int
    errors: dict[str, list[float]]


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
    handle = Rehash(
        pipeline, range(steps), steps, record=lambda step, found: recorded[step].append(found.flatten().float().cpu())
    )
    for seed in seeds:
        generate(seed)
    handle.remove()
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
    pipeline: Any, generate: Callable[[int], Tensor], steps: int, count: int, *, learn: Sequence[int], choose: Sequence[int]
) -> Choice:
    """Learns schedules on some seeds and chooses among them on others.

    Args:
        pipeline: Of diffusers, with a scheduler of first order.
        generate: Seed -> what the pipeline makes of it in so many steps, latents or frames.
        steps: Of a full run.
        count: Full steps that may be taken.
        learn: Seeds whose predictions decide the schedules.
        choose: Other seeds, at least two, on which they are compared with full runs.

    Raises:
        Problem: If seeds are shared or too few, or the count cannot be.
    """
    check_count(steps, count)
    if len(choose) < 2 or not learn or set(learn) & set(choose):
        raise Problem(
            "These seeds cannot choose a schedule.", why="one that chooses must not have learned, and an interval needs two.", fix="`learn=[0, 1], choose=[2, 3, 4]`"
        )  # fmt: skip
    tried = candidates(pipeline, predictions(pipeline, generate, steps, learn), count)
    full_runs = {seed: generate(seed).double() for seed in choose}
    errors: dict[str, list[float]] = {}
    for name, (full, order) in tried.items():
        handle = Rehash(pipeline, full, steps, order=order)
        errors[name] = [float((generate(seed).double() - whole).square().mean().sqrt()) for seed, whole in full_runs.items()]
        handle.remove()
    best = min(errors, key=lambda name: float(np.mean(errors[name])))
    gain = paired_interval(np.array(errors[EVEN]), np.array(errors[best]))
    name = best if gain.high < 0 else EVEN
    return Choice(name, *tried[name], errors)
