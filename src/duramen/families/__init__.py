"""Architecture families as data: one table per file, found by ``config.model_type``."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path

from duramen.families.table import Family
from duramen.problem import Exit, Problem


@cache
def known_families() -> dict[str, Family]:
    """``model_type`` -> table, for every family file of this folder."""
    found: dict[str, Family] = {}
    for item in pkgutil.iter_modules([str(Path(__file__).parent)]):
        family = getattr(importlib.import_module(f"{__name__}.{item.name}"), "FAMILY", None)
        if isinstance(family, Family):
            found.update(dict.fromkeys(family.model_types, family))
    return found


def find_family(model_type: str) -> Family:
    """The table of a model type.

    Raises:
        Problem: If no table lists it.
    """
    family = known_families().get(model_type)
    if family is None:
        raise Problem(
            f"There is no family table for the architecture {model_type!r}.",
            why=f"the tables cover: {', '.join(sorted(known_families()))}.",
            fix="`--allow-generic` infers the linear layers and prints its guess; check it before you trust the result.",
            code=Exit.INCOMPATIBLE,
        )
    return family
