"""From a ratio to the units that stay: how many in each block, and which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from duramen.problem import Problem
from duramen.shrink.groups import Units

Allocation = Literal["local", "global", "flap"]
Scores = Mapping[tuple[int, str], Tensor]
"""(block, kind) -> importance of its units, [U]."""
Gone = dict[tuple[int, str], list[int]]
"""(block, kind) -> the units that go, sorted."""


def allocate(units: list[Units], scores: Scores, wanted: float, *, allocation: Allocation, round_to: int, minimum: int) -> Gone:
    """Chooses the units that go.

    Args:
        units: All that may go. Of query heads a unit is one in every KV group.
        scores: Their importance; across blocks and kinds it must be comparable for ``global``.
        wanted: Parameters to remove.
        allocation: The same share in every block; by score per parameter over all; or so after standardising each block's
            scores (FLAP).
        round_to: FFN widths become multiples of it.
        minimum: Least FFN width.

    Raises:
        Problem: If so much cannot be removed, or nothing is so little.
    """
    reachable = sum(_most(each, round_to, minimum) * each.parameters for each in units)
    if wanted > reachable:
        raise Problem(
            f"{wanted:,.0f} parameters are to go, and at most {reachable:,} can.",
            why=f"every block keeps one KV group and {minimum} FFN channels, in multiples of {round_to}.",
            fix="a smaller `ratio`, a smaller `minimum` or `round_to`, or more `families`.",
        )
    counts = (
        _local(units, wanted) if allocation == "local" else _global(units, scores, wanted, standardised=allocation == "flap")
    )
    rounded = {key: _rounded(each, counts[key], round_to, minimum) for each in units for key in [(each.block, each.kind)]}
    if wanted and not any(rounded.values()):
        raise Problem(
            f"{wanted:,.0f} parameters are to go, and no unit is so small.",
            why=f"heads leave as wholes and FFN widths become multiples of {round_to}, to the nearest, which is none here.",
            fix="a larger `ratio`, or a smaller `round_to`.",
        )
    return {key: sorted(torch.argsort(scores[key], stable=True)[:count].tolist()) for key, count in rounded.items()}


def _most(units: Units, round_to: int, minimum: int) -> int:
    """How many units of one kind and block can go."""
    if units.kind != "ffn_channel":
        return units.count - 1
    return max(0, units.count - -(-minimum // round_to) * round_to)


def _rounded(units: Units, count: float, round_to: int, minimum: int) -> int:
    """The nearest number of units to go that is allowed."""
    most = _most(units, round_to, minimum)
    if units.kind == "ffn_channel" and 0 < count < units.count:
        count = units.count - round((units.count - count) / round_to) * round_to
    return max(0, min(round(count), most))


def _local(units: list[Units], wanted: float) -> dict[tuple[int, str], float]:
    """The same share everywhere: whole heads first, to the nearest, and FFN channels for the rest."""
    share = wanted / sum(each.count * each.parameters for each in units)
    counts: dict[tuple[int, str], float] = {}
    for block in {each.block for each in units}:
        here = [each for each in units if each.block == block]
        left = share * sum(each.count * each.parameters for each in here)
        for each in sorted(here, key=lambda each: each.kind == "ffn_channel"):
            alone = each.kind == "ffn_channel" or len(here) == 1
            count = left / each.parameters if alone else min(round(share * each.count), each.count - 1)
            counts[block, each.kind] = count
            left -= count * each.parameters
    return counts


def _global(units: list[Units], scores: Scores, wanted: float, *, standardised: bool) -> dict[tuple[int, str], float]:
    """The least important units of the whole model, by score per parameter or by standardised score.

    Scores of single units know nothing of each other. What has left a block is carried by those that stay, so the k-th of its U units to leave counts
    U/(U − k) times; this is our reading, and what scoring anew after every unit would give if importance were spread evenly. FLAP's standardised scores go as they are.
    """
    order = []
    for each in units:
        found = scores[each.block, each.kind].double().sort().values
        spread = found.std(correction=0).clamp_min(1e-30)
        carried = each.count / torch.arange(each.count, 0, -1, dtype=found.dtype)
        values = (found - found.mean()) / spread if standardised else found / each.parameters * carried
        # the last one stays
        order += [(value, each) for value in values.tolist()[: each.count - 1]]
    counts = {(each.block, each.kind): 0.0 for each in units}
    for _, each in sorted(order, key=lambda item: item[0]):
        if wanted < each.parameters / 2:
            break
        counts[each.block, each.kind] += 1
        wanted -= each.parameters
    return counts
