"""Which layers a step touches: filters by role, by block range, or by glob over the full name."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from duramen.problem import Problem

if TYPE_CHECKING:
    from duramen.families.model import BlockModel


def filter_layers(names: dict[str, tuple[str, int]], only: Sequence[str], skip: Sequence[str]) -> list[str]:
    """Applies the two filters of a step.

    Args:
        names: Full layer name -> (role, block).
        only: A layer stays if any entry matches it; empty keeps all.
        skip: A layer leaves if any entry matches it.

    Returns:
        The names that stay, in order.

    Raises:
        Problem: If an entry matches nothing, or nothing is left.
    """
    for entry in (*only, *skip):
        if not any(matches(entry, name, *where) for name, where in names.items()):
            raise _no_match(entry, names)
    kept = [
        name
        for name, where in names.items()
        if (not only or any(matches(entry, name, *where) for entry in only))
        and not any(matches(entry, name, *where) for entry in skip)
    ]
    if not kept:
        raise _no_match(f"only={list(only)}, skip={list(skip)}", names)
    return kept


def trainable(model: BlockModel, only: Sequence[str], skip: Sequence[str]) -> list[str]:
    """The layers of a model that filters choose, without those whose weight a block reads without calling them, such as Mamba's ``dt``: nothing else can stand in their place.

    Raises:
        Problem: If an entry matches nothing, or nothing is left.
    """
    chosen = filter_layers(model.layer_names(), only, skip)
    found = [name for name in chosen if not model.tapped(name)]
    if not found:
        raise Problem(
            f"{chosen[0]} cannot be trained.",
            why="its block reads the weight without calling the layer.",
            fix="other layers in `only`.",
        )
    return found


def matches(entry: str, name: str, role: str, block: int) -> bool:
    """Whether one filter entry (``q``, ``blocks:4-27``, ``*.mlp.*``) names this layer."""
    span = re.fullmatch(r"blocks:(\d+)(?:-(\d+))?", entry)
    if span:
        return int(span[1]) <= block <= int(span[2] or span[1])
    return entry == role or fnmatch.fnmatchcase(name, entry)


def _no_match(entry: str, names: dict[str, tuple[str, int]]) -> Problem:
    roles = sorted({role for role, _ in names.values()})
    last = max((block for _, block in names.values()), default=-1)
    return Problem(
        f"The filter {entry} matches no layer.",
        why=f"the roles here are {', '.join(roles)}; the blocks are 0 to {last}; names look like {next(iter(names), '-')}.",
        fix="a role (`q`), a block range (`blocks:4-27`), or a glob over names (`*.mlp.*`).",
    )
