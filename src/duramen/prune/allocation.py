"""How much of a global share each layer gives up: equally much, less where outliers are, or what the error curves say.

``owl`` is Yin et al., "Outlier Weighed Layerwise Sparsity", arXiv 2310.05175: blocks with many outlying Wanda scores keep more.
``curve`` is ours: the method's own error at several shares gives every layer a curve, and the share is spent where the *relative*
error rises least. Both look at the dense model once before anything is edited, and both hit the global count exactly (but for
Wanda, whose quota is by rows and rounds in each). For linear layers a kept weight is a parameter, a multiply-add per token, and its bytes, so one global share is the budget of all three.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch

from duramen.calibrate.statistics import Statistics
from duramen.families.model import Layer
from duramen.prune.pruned import Pruned
from duramen.prune.reconstruct import output_error

Allocation = Literal["uniform", "owl", "curve"]
OUTLIER, SPREAD = 5.0, 0.08
"""OWL: scores above so many times the block's mean are outliers; densities spread by so much around the mean."""
REACH, POINTS = 0.15, 7
"""Curve: shares may differ so much from the global one; at so many of them the loss is taken."""
ROWS = 128
"""Rows of a layer that stand for all in its curve."""


@dataclass(frozen=True)
class Survey:
    """What one layer of the dense model shows: its size, and outlying scores (OWL) or relative errors at ``points`` (curve)."""

    name: str
    block: int
    size: int
    outliers: float = 0.0
    errors: tuple[float, ...] = ()


def survey(
    layer: Layer, statistics: Statistics, prune: Callable[..., Pruned], *, share: float, allocation: Allocation
) -> dict[str, Any]:
    """Looks at one layer of the dense model.

    Args:
        layer: Dense.
        statistics: Of its inputs.
        prune: (weight, gram, sparsity=…) -> Pruned; its errors make the curve.
        share: Global share to remove.
        allocation: ``owl`` or ``curve``.

    Returns:
        The fields of ``Survey``.
    """
    weight, gram = layer.read().float(), statistics.total.second
    found: dict[str, Any] = {"name": layer.name, "block": layer.block, "size": weight.numel()}
    if allocation == "owl":
        scores = weight.abs() * gram.diagonal().float().sqrt()
        return found | {"outliers": float((scores > OUTLIER * scores.mean()).float().mean())}
    rows = weight[:: max(1, len(weight) // ROWS)][:ROWS]
    whole = max(output_error(rows, torch.zeros_like(rows), gram), 1e-30)
    return found | {"errors": [prune(rows, gram, sparsity=point).error / whole for point in points(share)]}


def points(share: float) -> list[float]:
    """The shares at which a curve is taken, from ``share`` − REACH to ``share`` + REACH, inside (0, 1)."""
    low, high = max(0.0, share - REACH), min(0.99, share + REACH)
    return [low + (high - low) * step / (POINTS - 1) for step in range(POINTS)]


def allocate(records: list[dict[str, Any]], share: float, allocation: Allocation) -> dict[str, float]:
    """The share that each layer gives up; its counts are whole and add up to round(share · all weights).

    Args:
        records: Of ``survey``, for all layers that are edited.
        share: Global share to remove, in [0, 1).
        allocation: ``owl`` or ``curve``.
    """
    surveys = [
        Survey(item["name"], item["block"], item["size"], item.get("outliers", 0.0), tuple(item.get("errors", ())))
        for item in records
    ]
    wanted = owl(surveys, share) if allocation == "owl" else curve(surveys, share)
    sizes = {item.name: item.size for item in surveys}
    counts = round_to_total(wanted, sizes, round(share * sum(sizes.values())))
    return {name: count / sizes[name] for name, count in counts.items()}


def owl(surveys: list[Survey], share: float) -> dict[str, float]:
    """Shares to remove: densities spread over 2·SPREAD by the blocks' outliers, shifted to the global mean (weighted by size)."""
    sizes: dict[int, int] = {}
    outliers: dict[int, float] = {}
    for item in surveys:
        sizes[item.block] = sizes.get(item.block, 0) + item.size
        outliers[item.block] = outliers.get(item.block, 0.0) + item.outliers * item.size
    levels = {block: outliers[block] / sizes[block] for block in sizes}
    low, high = min(levels.values()), max(levels.values())
    reach = min(SPREAD, share / 2, (1 - share) / 2)
    density = {block: 2 * reach * (level - low) / (high - low) if high > low else 0.0 for block, level in levels.items()}
    mean = sum(density[block] * sizes[block] for block in sizes) / sum(sizes.values())
    return {item.name: share - density[item.block] + mean for item in surveys}


def curve(surveys: list[Survey], share: float) -> dict[str, float]:
    """Shares to remove: segments of the layers' convexified curves are taken by their rise per weight until the budget is spent."""
    places = points(share)
    segments = []
    for item in surveys:
        corners = _lower_hull(list(zip(places, item.errors, strict=True)))
        for (left, error), (right, worse) in pairwise(corners):
            segments.append(((worse - error) / ((right - left) * item.size), item.name, (right - left) * item.size))
    shares = {item.name: places[0] * item.size for item in surveys}
    left_over = share * sum(item.size for item in surveys) - sum(shares.values())
    for _, name, count in sorted(segments):
        taken = min(count, max(left_over, 0.0))
        shares[name] += taken
        left_over -= taken
    return {item.name: shares[item.name] / item.size for item in surveys}


def _lower_hull(corners: list[tuple[float, float]]) -> list[tuple[float, float]]:
    hull: list[tuple[float, float]] = []
    for x, y in corners:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull


def round_to_total(shares: dict[str, float], sizes: dict[str, int], total: int) -> dict[str, int]:
    """Whole counts that add up to ``total``, by largest remainders; none outside [0, size − 1].

    What layers at that limit cannot give up, those with the most weights left give up in their place.
    """
    exact = {name: min(max(shares[name], 0.0) * sizes[name], sizes[name] - 1) for name in shares}
    counts = {name: math.floor(value) for name, value in exact.items()}
    missing = total - sum(counts.values())
    open_ended = [name for name in exact if counts[name] < sizes[name] - 1]
    for name in sorted(open_ended, key=lambda name: (counts[name] - exact[name], name))[: max(missing, 0)]:
        counts[name] += 1
    for name in sorted(counts, key=lambda name: (counts[name] - sizes[name], name)):
        missing = total - sum(counts.values())
        counts[name] = max(0, min(counts[name] + missing, sizes[name] - 1))
    return counts
