"""How candidates change: masks by the law that the seed's algorithm wants, levels without leaving the budget.

"Search for Efficient Large Language Models" (Shen et al., arXiv 2409.17372), Algorithm 1, draws subsets until one overlaps enough
with its parent, and after a thousand failures returns the parent, which has the wrong size. Below about 0.9 it always fails. The law
that it wants can be drawn at once, which is our derivation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from duramen.search.database import Genome, Module

SAME_KIND = 0.8
"""Share of the switches that stay within one kind of units."""


def mutate_mask(kept: Tensor, length: int, count: int, similarity: float, generator: torch.Generator) -> Tensor:
    """A random subset, uniform over all of its size that have enough in common with the parent.

    The size of the overlap follows the hypergeometric law, truncated; inside and outside of the parent all choices are alike.

    Args:
        kept: The parent's indices, [K].
        length: How many indices there are, N.
        count: Size of the subset, k'.
        similarity: α: at least α·min(K, k') indices are the parent's, or as many as there must be.
        generator: Source of chance.

    Returns:
        Sorted indices, [k'].
    """
    parent = len(kept)
    most = min(parent, count)
    least = max(math.ceil(similarity * most - 1e-9), parent + count - length, 0)
    overlap = torch.arange(least, most + 1, dtype=torch.float64)
    logs = _log_choices(parent, overlap) + _log_choices(length - parent, count - overlap)
    drawn = int(torch.multinomial((logs - logs.max()).exp(), 1, generator=generator)) + least
    outside = torch.ones(length, dtype=torch.bool)
    outside[kept] = False
    others = outside.nonzero().flatten()
    mine = kept[torch.randperm(parent, generator=generator)[:drawn]]
    new = others[torch.randperm(len(others), generator=generator)[: count - drawn]]
    return torch.cat([mine, new]).sort().values


def _log_choices(total: int, chosen: Tensor) -> Tensor:
    """Log of total over chosen."""
    whole = torch.tensor(float(total), dtype=torch.float64)
    return torch.lgamma(whole + 1) - torch.lgamma(chosen + 1) - torch.lgamma(whole - chosen + 1)


def switch_levels(genome: Genome, modules: Sequence[Module], generator: torch.Generator) -> Genome:
    """One to three switches, few more often than many: one module goes up by a level, another down.

    Four times in five both are of one kind, and equal steps leave all costs as they were; else ``repair`` must follow.
    """
    levels = list(genome)
    for _ in range(min(up_to(3, generator), up_to(3, generator)) + 1):
        wider = [number for number, module in enumerate(modules) if levels[number] < module.full]
        if not wider:
            break
        up = wider[up_to(len(wider), generator)]
        alike = float(torch.rand(1, generator=generator)) < SAME_KIND
        narrower = [
            number
            for number, module in enumerate(modules)
            if number != up and levels[number] > 0 and (not alike or module.units.kind == modules[up].units.kind)
        ]
        if narrower:
            levels[up] += 1
            levels[narrower[up_to(len(narrower), generator)]] -= 1
    return tuple(levels)


def up_to(count: int, generator: torch.Generator) -> int:
    """A number from 0 to ``count`` − 1, all alike."""
    return int(torch.randint(count, (1,), generator=generator))
