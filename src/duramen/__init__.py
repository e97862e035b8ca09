"""Duramen makes foundation models small and fast, and proves what is left."""

import importlib
from typing import Any

__version__ = "0.1.0"

_VERBS = ("run", "compress", "sweep", "plan", "inspect", "compare", "load")
_PACKAGES = ("prune", "evaluate", "export", "report", "families", "calibrate")


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return getattr(importlib.import_module("duramen.api"), name)
    if name in _PACKAGES:
        return importlib.import_module(f"duramen.{name}")
    raise AttributeError(f"module 'duramen' has no attribute {name!r}")
