"""Pruning: magnitude, Wanda, SparseGPT and the multi-weight method behind one contract, and exact reconstruction for any mask."""

import importlib
from types import ModuleType

_MODULES = ("magnitude", "wanda", "sparsegpt", "multiweight", "reconstruct", "pattern")


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
