"""Packages that share their name with a verb of the Python interface, such as ``duramen.evaluate``.

Importing a package binds its name in the parent, so the package itself has to answer when it is called.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class Verb(ModuleType):
    """A package that can be called; the call goes to the function of its name in ``duramen.api``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        verb = getattr(importlib.import_module("duramen.api"), self.__name__.rpartition(".")[2])
        return verb(*args, **kwargs)
