"""Which denoising steps run in full, and what stands in for the others: the published rule, even spacing, and the best schedule by what a solver makes of a stale prediction.

"Streamlined Inference" (Zhan et al., NeurIPS 2024, arXiv 2411.01171) compares a feature between steps by its cosine (Algorithm 1). A deterministic solver says exactly how much a stale prediction counts: in x/a, a step adds (λ' − λ)·e, so an error
of e at that step weighs |λ' − λ|, and the schedule of least summed cost follows by dynamic programming (ours, method sheet 2.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from duramen.problem import Problem

OFFSET = 1e-3
"""Added to λ before its logarithm is taken, which keeps the last steps finite."""


def similarity(features: Float[Tensor, "K R D"]) -> Float[Tensor, "K K"]:
    """Cosine between steps, of every sample, and its mean.

    Args:
        features: Of every step and sample.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    return torch.einsum("krd,lrd->kl", unit, unit) / features.shape[1]


def threshold_schedule(alike: Float[Tensor, "K K"], threshold: float) -> list[int]:
    """Algorithm 1: a step runs in full when the feature has become less like that of the last full one than the threshold; so do the first and the last.

    The printed loop compares a step with itself once more and need not end where rounding makes it less than one; here the next step follows.

    Args:
        alike: Of ``similarity``.
        threshold: γ; larger means more full steps.

    Raises:
        Problem: If there is no threshold to speak of.
    """
    if math.isnan(threshold) or threshold > 1:
        raise Problem(
            f"{threshold} is no similarity.", why="cosines are at most 1.", fix="a number below 1, or a number of full steps."
        )
    steps, full = len(alike), [0]
    for step in range(1, steps):
        if alike[step, full[-1]] < threshold:
            full.append(step)
    return full if full[-1] == steps - 1 else [*full, steps - 1]


def threshold_for(alike: Float[Tensor, "K K"], count: int) -> list[int]:
    """The schedule of the published rule with at most so many full steps, as near as there is: their number need not grow with the threshold, so every value is tried."""
    found = [threshold_schedule(alike, float(value)) for value in torch.unique(alike).clamp_max(1)]
    return max((each for each in found if len(each) <= count), key=len, default=[0, len(alike) - 1])


def uniform_schedule(steps: int, count: int) -> list[int]:
    """Full steps at even distances, the first and the last among them.

    Raises:
        Problem: If there are fewer than two, or more than steps.
    """
    check_count(steps, count)
    return [round(place * (steps - 1) / (count - 1)) for place in range(count)]


def check_count(steps: int, count: int) -> None:
    """Stops on numbers of full steps that cannot be.

    Raises:
        Problem: If there are fewer than two, or more than steps.
    """
    if not 2 <= count <= steps:
        raise Problem(
            f"{count} full steps of {steps} cannot be.",
            why="the first and the last run in full, and no more than all can.",
            fix=f"2 to {steps}.",
        )


def reuse_cost(predictions: Float[Tensor, "K R D"], weights: Float[Tensor, "K+1"]) -> Float[Tensor, "K K+1"]:
    """c[j, i]: what it costs to keep the prediction of step j up to, but not including, step i; infinite for i ≤ j.

    Args:
        predictions: e, or a velocity, of every step and sample; norms count.
        weights: λ before every step and after the last one.
    """
    steps = len(predictions)
    jump = (weights[1:] - weights[:-1]).abs().double()
    flat = predictions.double()
    distance = torch.stack([(flat - flat[step]).norm(dim=-1).mean(1) for step in range(steps)])
    cost = torch.full((steps, steps + 1), torch.inf, dtype=torch.float64)
    for first in range(steps):
        added = torch.cat([torch.zeros(1, dtype=torch.float64), (jump * distance[first])[first + 1 :].cumsum(0)])
        cost[first, first + 1 :] = added
    return cost


def optimal_schedule(cost: Float[Tensor, "K K+1"], count: int) -> tuple[list[int], float]:
    """The schedule of least summed cost with so many full steps, the first and the last among them; and its cost.

    Args:
        cost: Of ``reuse_cost``.
        count: Full steps.

    Raises:
        Problem: If there are fewer than two, or more than steps.
    """
    steps = len(cost)
    check_count(steps, count)
    best = torch.full((count, steps), torch.inf, dtype=torch.float64)
    back = torch.zeros(count, steps, dtype=torch.long)
    best[0, 0] = 0.0
    for place in range(1, count):
        total = best[place - 1][:, None] + cost[:, :steps]
        best[place], back[place] = total.min(0)
    path = [steps - 1]
    for place in range(count - 1, 0, -1):
        path.append(int(back[place, path[-1]]))
    return path[::-1], float(best[-1, -1])


def schedule_cost(cost: Float[Tensor, "K K+1"], full: Sequence[int]) -> float:
    """Summed cost of a schedule."""
    ends = [*full[1:], len(cost)]
    return float(sum(cost[first, end] for first, end in zip(full, ends, strict=True)))


def forecast(history: Sequence[tuple[int, Tensor]], weights: Float[Tensor, "K+1"], step: int) -> Tensor:
    """What a prediction will be, by a line through the last two full ones in log λ; the last one where there is only one.

    Args:
        history: (step, prediction) of full steps.
        weights: λ before every step.
        step: For which.
    """
    last, found = history[-1]
    if len(history) < 2:
        return found
    before, older = history[-2]
    at = (weights + OFFSET).log()
    share = float((at[step] - at[last]) / (at[last] - at[before]))
    return found + (found - older) * share
