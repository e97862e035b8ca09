"""At which layers tokens leave, and what share stays each time, so that a share of a prompt's cost is saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from duramen.problem import Problem

FIRST, EVERY = 10, 5
"""The published sites: not before the tenth layer, then every fifth."""
HALF = 0.5
"""Share that stays where tokens are merged in pairs."""
HAIR = 1e-9
"""By how much a product of a share and a count may miss the whole number that it is."""


def kept_count(tokens: float, keep: float) -> int:
    """⌈keep·tokens⌉, where 0.55 of 100 is 55; of any tokens, at least one stays."""
    return max(math.ceil(keep * tokens - HAIR), int(tokens > 0))


@dataclass(frozen=True)
class Costs:
    """What a prompt costs.

    Attributes:
        layers: Of every layer, what so many tokens cost.
        site: What it costs to choose among so many tokens.
        outside: What comes on top, whatever leaves.
        unit: What is counted.
        stays: Tokens that never leave.
        whole: Whether only whole tokens stay, ⌈share·tokens⌉, which counts where there are few of them.
    """

    layers: Sequence[Callable[[float], float]]
    site: Callable[[float], float] = lambda tokens: 0.0
    outside: float = 0.0
    unit: str = "tokens"
    stays: int = 0
    whole: bool = False

    def by_layer(self, tokens: int, keep: Mapping[int, float]) -> list[float]:
        """Of every layer, with its site, where a share stays after some of them."""
        found, left = [], float(tokens)
        for layer, cost in enumerate(self.layers):
            found.append(cost(left) + (self.site(left) if layer in keep else 0.0))
            if layer in keep:
                count = left - self.stays
                left = self.stays + (kept_count(count, keep[layer]) if self.whole else keep[layer] * count)
        return found

    def total(self, tokens: int, keep: Mapping[int, float]) -> float:
        """Of a whole prompt."""
        return self.outside + sum(self.by_layer(tokens, keep))


def counted_tokens(layers: int) -> Costs:
    """Every layer costs its tokens, which is what the paper counts."""
    return Costs([float] * layers)


def token_fraction(layers: int, keep: Mapping[int, float]) -> float:
    """Mean share of the tokens that a layer sees, where a share stays after some of them."""
    return sum(counted_tokens(layers).by_layer(1, keep)) / layers


def solve_keep(costs: Costs, sites: Sequence[int], cut: float, *, tokens: int = 1, least: float = 0.0) -> float:
    """The largest share that may stay at every site to save ``cut`` of the cost of a prompt; the saving falls as the share grows, so by bisection.

    Args:
        costs: Of a prompt.
        sites: Layers after which tokens leave, from 0.
        cut: Share of the cost to save.
        tokens: Length of the prompt.
        least: Share that has to stay at a site: a half, ``HALF``, where what leaves is merged with what stays.

    Raises:
        Problem: If so much cannot be saved at these sites.
    """
    dense = costs.total(tokens, {})

    def saved(keep: float) -> float:
        return 1 - costs.total(tokens, dict.fromkeys(sites, keep)) / dense

    if cut == 0:
        return 1.0
    most = saved(least)
    if cut > most or (cut == most and not least and not costs.whole):
        raise cannot_cut(costs, sites, cut, most, merged=least > 0)
    if cut == most and least:
        return least
    low, high = least, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if saved(middle) >= cut else (low, middle)
    return low


def cannot_cut(costs: Costs, sites: Sequence[int], cut: float, most: float, *, merged: bool = False) -> Problem:
    """What is said where so much of the cost of a prompt cannot be saved at some sites, and how much at most can."""
    pairs = "at most half of the tokens at a site find another to be merged with, and " if merged else ""
    return Problem(
        f"{100 * cut:.4g}% of the {costs.unit} cannot be cut after the layers {', '.join(map(str, sites)) or 'none'} of {len(costs.layers)}.",
        why=f"{pairs}the layers up to the first site see all tokens; at most {math.floor(1000 * most) / 10:g}% can be cut.",
        fix="earlier `sites`, or a smaller `cut`.",
    )


def published_sites(layers: int) -> list[int]:
    """The sites of the paper's models, and the same rule for others: 12 to 42 of 64 layers, 10 to 35 of 48, every fifth."""
    first = {64: 12}.get(layers, min(FIRST, layers // 4))
    last = {64: 42, 48: 35}.get(layers, min(round(0.7 * layers), layers - 2))
    return list(range(first, last + 1, EVERY if layers >= 4 * EVERY else 1))


def vision_sites(layers: int) -> list[int]:
    """Where patches leave: after 5, 10 and 15 layers of 24, as in the published Vim-Small, and in the same places of deeper and shallower models."""
    return sorted({max(0, round(layers * share / 24) - 1) for share in (5, 10, 15)})
