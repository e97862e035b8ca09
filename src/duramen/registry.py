"""Methods by name. A method is one file with one ``@method`` function; nothing central lists it.

Names are found by reading the package's sources for the decorator, so that looking one up imports that file alone.
Other packages add methods through the entry point group ``duramen.methods``.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

from duramen.problem import Problem


class Named(str):
    """Text in a setting that may name a file or folder; what that holds decides the result as well."""

    __slots__ = ()


Place = Annotated[str, AfterValidator(Named)]


class Settings(BaseModel):
    """Base of every method's settings: frozen, unknown keys are errors, field docstrings are the documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @property
    def leaves(self) -> tuple[str, ...]:
        """What the step leaves in a model that no later one may undo; see ``duramen.order``."""
        return ()

    @property
    def undoes(self) -> tuple[str, ...]:
        """What it would undo if an earlier step had left it."""
        return ()


@dataclass(frozen=True)
class Method:
    """One registered method.

    Attributes:
        name: As written in recipes.
        title: For people.
        paper: Where it comes from.
        kind: prune, shrink, quantize, reduce, recover, evaluate.
        settings: The frozen settings model; its fields are the schema of the step.
        apply: The function that carries it out.
        summary: First line of the module's docstring.
        rehearse: Of a method of images: takes what ``apply`` takes, leaves a model of the same shapes that learned nothing, and raises what can be known so early; None if there is nothing.
    """

    name: str
    title: str
    paper: str
    kind: str
    settings: type[Settings]
    apply: Callable[..., Any]
    summary: str
    rehearse: Callable[..., None] | None = None


def method(
    name: str,
    *,
    title: str,
    paper: str,
    kind: str,
    settings: type[Settings],
    rehearse: Callable[..., None] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function as the entry of a method."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        doc = importlib.import_module(function.__module__).__doc__ or ""
        entry = Method(name, title, paper, kind, settings, function, doc.strip().split("\n")[0], rehearse)
        function.__dict__["method"] = entry
        return function

    return register


@cache
def method_modules() -> dict[str, str]:
    """Name of every method -> the module that defines it."""
    root = Path(__file__).parent
    found: dict[str, str] = {}
    for file in sorted(root.glob("*/*.py")):
        for match in re.finditer(r'^@method\(\s*"(\w+)"', file.read_text(encoding="utf-8"), re.MULTILINE):
            found[match[1]] = f"duramen.{file.parent.name}.{file.stem}"
    for entry in importlib.metadata.entry_points(group="duramen.methods"):
        found[entry.name] = entry.value
    return found


def get_method(name: str) -> Method:
    """Looks a method up by its name in recipes.

    Raises:
        Problem: If there is none, with the nearest name.
    """
    modules = method_modules()
    if name not in modules:
        raise Problem(
            f"There is no method {name!r}.",
            why=f"the methods are: {', '.join(sorted(modules))}.",
            fix=suggestion(name, modules) or "`duramen methods` lists them with their settings.",
        )
    module = importlib.import_module(modules[name])
    for value in vars(module).values():
        entry = getattr(value, "__dict__", {}).get("method")
        if isinstance(entry, Method) and entry.name == name:
            return entry
    raise AssertionError(f"{modules[name]} does not register {name}")


def suggestion(word: str, known: object) -> str:
    """``did you mean `x`?`` for the nearest of the known words, or an empty string."""
    near = difflib.get_close_matches(str(word), [str(item) for item in known], n=1, cutoff=0.5)  # type: ignore[attr-defined]
    return f"did you mean `{near[0]}`?" if near else ""
