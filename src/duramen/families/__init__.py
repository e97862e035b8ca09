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


OWN = "duramen_"
"""How the model types of ``modeling_duramen.py`` begin; the rest is the stock type whose layers they are built from."""


def register_own(model_type: str) -> None:
    """Makes transformers know a model type of ``modeling_duramen.py``, so that no code beside the weights is run."""
    if not model_type.startswith(OWN):
        return
    from transformers import AutoConfig, AutoModelForCausalLM

    from duramen.families.modeling_duramen import classes

    config, model = classes(model_type.removeprefix(OWN))
    AutoConfig.register(model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)


def find_family(model_type: str) -> Family:
    """The table of a model type, or of the stock type that one of our own is built from.

    Raises:
        Problem: If no table lists it.
    """
    family = known_families().get(model_type.removeprefix(OWN))
    if family is None:
        raise Problem(
            f"There is no family table for the architecture {model_type!r}.",
            why=f"the tables cover: {', '.join(sorted(known_families()))}.",
            fix="`--allow-generic` infers the linear layers and prints its guess; check it before you trust the result.",
            code=Exit.INCOMPATIBLE,
        )
    return family
