"""At which layers tokens leave, and what share stays each time, so that a share of the work is saved."""

from __future__ import annotations

import math
from collections.abc import Sequence

from duramen.problem import Problem

FIRST, EVERY = 10, 5
"""The published sites: not before the tenth layer, then every fifth."""
HAIR = 1e-9
"""By how much a product of a share and a count may miss the whole number that it is."""


def kept_count(tokens: int, keep: float) -> int:
    """⌈keep·tokens⌉, where 0.55 of 100 is 55."""
    return math.ceil(keep * tokens - HAIR)


def token_fraction(layers: int, sites: Sequence[int], keep: float | Sequence[float]) -> float:
    """Mean share of the tokens that a layer sees.

    Args:
        layers: How many there are.
        sites: Layers after which tokens leave, from 0.
        keep: Share that stays at each site, or at all of them.
    """
    shares = [keep] * len(sites) if isinstance(keep, int | float) else list(keep)
    left = dict(zip(sites, shares, strict=True))
    seen, now = 0.0, 1.0
    for layer in range(layers):
        seen += now
        now *= left.get(layer, 1.0)
    return seen / layers


def solve_keep(layers: int, sites: Sequence[int], cut: float) -> float:
    """The share that must stay at every site for the mean layer to see 1 − ``cut`` of the tokens; the cut falls as the share grows, so by bisection.

    Raises:
        Problem: If so much cannot be cut at these sites.
    """
    most = 1 - token_fraction(layers, sites, 0.0)
    if not 0 <= cut < most:
        raise Problem(
            f"{cut:.0%} of the tokens cannot be cut after the layers {', '.join(map(str, sites)) or 'none'} of {layers}.",
            why=f"the layers up to the first site see all of them; at most {most:.0%} can be cut.",
            fix="earlier `sites`, or a smaller cut.",
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - token_fraction(layers, sites, middle) > cut else (low, middle)
    return high


def published_sites(layers: int) -> list[int]:
    """The sites of the paper's models, and the same rule for others: 12 to 42 of 64 layers, 10 to 35 of 48, every fifth."""
    first = {64: 12}.get(layers, min(FIRST, layers // 4))
    last = {64: 42, 48: 35}.get(layers, round(0.7 * layers))
    return list(range(first, last + 1, EVERY if layers >= 4 * EVERY else 1))
