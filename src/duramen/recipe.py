"""Recipes: a flat, ordered YAML list of steps. Loaded, validated, resolved against defaults, and locked.

Values are read as YAML 1.2 does: ``pattern: 2:4`` stays text (YAML 1.1 would read the number 124).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from duramen.problem import Problem
from duramen.registry import Settings, get_method, suggestion
from duramen.rundir import hash_named, write_text


class Calibration(BaseModel):
    """What the methods see."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    text: tuple[str, ...] = ("squad", "coqa", "drop", "sciriff")
    """Embedded texts or files (.txt, .jsonl or .parquet with a column `text`); their documents are shuffled together."""
    sequences: int = Field(default=64, ge=1)
    """Number of windows."""
    length: int = Field(default=512, ge=2)
    """Tokens per window."""
    activation_memory: float = Field(default=2.0, ge=0)
    """GiB of activations to hold in memory; what exceeds them is kept on disk. Changes no result."""


NEW, DRAWN, FASHION = "new", "shapes", "fashion-mnist"
"""A model of images that the recipe itself begins, images that Duramen draws, and grey ones that are embedded."""


class ImageData(BaseModel):
    """What models of images see."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    data: str = FASHION
    """`fashion-mnist`, `shapes` (drawn), or a folder with `train` and `test`, in each of which every class has a subfolder."""
    size: int = Field(default=28, ge=2)
    """Height and width in pixels where the model is new; otherwise the model says it."""
    channels: Literal[1, 3] = 1
    """3 for colour, 1 for grey, where the model is new; if not given, 1 for `fashion-mnist` and 3 for others."""
    train: int | None = Field(default=None, ge=2)
    """The first so many training images of an embedded set; null for all."""
    test: int | None = Field(default=None, ge=2)
    """The same of test images."""
    held_out: float = Field(default=0.03, gt=0, le=0.5)
    """Share of the training images that are not trained on, by which the best checkpoint is chosen."""
    corrupt: Literal["refuse", "skip"] = "refuse"
    """What becomes of image files that cannot be read: the first one is named and the run stops, or all are named and left out."""

    @model_validator(mode="before")
    @classmethod
    def _colours_of(cls, value: Any) -> Any:
        """Only the embedded set is grey."""
        grey = not isinstance(value, dict) or value.get("data", FASHION) == FASHION
        return value if grey else {"channels": 3} | value


class Recipe(BaseModel):
    """A whole recipe, as resolved."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str = "recipe"
    """Shown in reports."""
    seed: int = 0
    """Of everything that is drawn."""
    dtype: str = Field(default="auto", pattern="^(auto|float32|bfloat16|float16)$")
    """Type of forward passes; `auto` takes the fastest that this machine has."""
    calibration: Calibration = Calibration()
    """What the methods see."""
    images: ImageData | None = None
    """What they see instead, where the model reads images."""
    steps: tuple[dict[str, Any], ...] = Field(min_length=1)
    """Methods with their settings, in order."""

    def resolved(self) -> list[Step]:
        """Every step with all its settings.

        Raises:
            Problem: On an unknown method or key, or a value out of range.
        """
        return [resolve_step(step, number) for number, step in enumerate(self.steps)]


class Step(BaseModel):
    """One method with all its settings."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    id: str
    method: str
    settings: Any

    def lock(self) -> dict[str, Any]:
        """As written to ``recipe.lock.yaml``, every default spelled out."""
        settings: dict[str, Any] = self.settings.model_dump(mode="json")
        return {"id": self.id, "method": self.method} | settings

    def fingerprint(self) -> dict[str, Any]:
        """All that decides what comes out of it, beside what it is given: its settings, and the files that they name."""
        return self.lock() | {"files": hash_named([self.settings])}

    def place(self, number: int) -> str:
        """Name of the folder in which it keeps its state, as a recipe's step of that number."""
        return f"step-{number:02d}-{self.id}"


class _Loader(yaml.SafeLoader):
    """The safe loader without YAML 1.1's base-60 numbers."""


_Loader.yaml_implicit_resolvers = {
    key: [(tag, pattern) for tag, pattern in items if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")]
    for key, items in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def load_recipe(source: str | Path | dict[str, Any], overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe from a file, a shipped name, or a dictionary.

    Args:
        source: Path, name of a shipped recipe (``quickstart``), or the recipe itself.
        overrides: ``key=value`` for the recipe or ``step.key=value`` for a step, by its id or method.

    Raises:
        Problem: If it does not exist, does not parse, or has unknown keys or values out of range.
    """
    raw = source if isinstance(source, dict) else _read(find_recipe(str(source)))
    for override in overrides or []:
        raw = _override(raw, override)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise explain(error, "recipe", Recipe) from error
    recipe.resolved()
    return recipe


def shipped_folder() -> Path:
    """Where the shipped recipes lie: in the package, or in the source tree."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def find_recipe(name: str, near: Path | None = None) -> Path:
    """The file of a recipe, by its path, from ``near`` if given, or by its shipped name."""
    beside = [near / name, near / f"{name}.yaml"] if near else []
    places = [*beside, Path(name), Path(f"{name}.yaml"), shipped_folder() / f"{name}.yaml"]
    for place in places:
        if place.is_file():
            return place
    shipped = sorted(path.stem for path in shipped_folder().glob("*.yaml"))
    raise Problem(
        f"There is no recipe {name}.",
        why=f"it is no file, and the shipped recipes are: {', '.join(shipped)}.",
        fix=suggestion(name, shipped) or "the path of a YAML file, or one of these names.",
    )


def _read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe with what it extends; ``below`` are those that extend it."""
    if path.resolve() in below:
        raise Problem(f"{path} extends itself.", why="a recipe begins with what it extends.", fix="a recipe that extends none.")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Problem(
            f"{path} is not valid YAML: {error}.", why="usually the indentation, or a colon inside a plain value.",
            fix="quote the value, or compare with a shipped recipe.",
        ) from error  # fmt: skip
    if not isinstance(raw, dict):
        raise Problem(
            f"{path} is not a recipe.",
            why="a recipe is a mapping with a list of `steps`.",
            fix="compare with recipes/quickstart.yaml.",
        )
    base = raw.pop("extends", None)
    return _merge(_read(find_recipe(str(base), path.parent), (*below, path.resolve())), raw) if base else raw


def _merge(base: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """The child's keys win; steps merge by id (the method's name if none is given), new ones are appended."""
    merged = base | child
    if "calibration" in base and "calibration" in child:
        merged["calibration"] = _mapping(base, "calibration") | _mapping(child, "calibration")
    if "steps" in base and "steps" in child:
        ids = [_step_id(step) for step in _steps(base)]
        twice = sorted({each for each in ids if ids.count(each) > 1})
        if twice:
            raise Problem(
                f"The recipe that is extended has several steps `{twice[0]}`.", why="steps are merged by their ids.",
                fix="an `id` of its own for each of them.",
            )  # fmt: skip
        steps = dict(zip(ids, _steps(base), strict=True))
        for step in _steps(child):
            steps[_step_id(step)] = steps.get(_step_id(step), {}) | step
        merged["steps"] = list(steps.values())
    return merged


def _mapping(raw: dict[str, Any], key: str) -> dict[str, Any]:
    """A part of a recipe that has keys of its own."""
    found = raw.get(key) or {}
    if not isinstance(found, dict):
        raise Problem(
            f"`{key}` reads {found!r}.",
            why="it is a mapping with keys of its own.",
            fix="compare with recipes/quickstart.yaml.",
        )
    return found


def _steps(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a recipe that was not validated yet."""
    found = raw.get("steps") or []
    if not isinstance(found, list) or not all(isinstance(step, dict) for step in found):
        raise Problem(
            "`steps` is no list of methods with their settings.",
            why="every step is a mapping.",
            fix="`- method: multiweight`, then its settings.",
        )
    return found


def _step_id(step: dict[str, Any]) -> str:
    return str(step.get("id", step.get("method", "")))


def parse_value(text: str) -> Any:
    """A value as YAML 1.2 reads it.

    Raises:
        Problem: If it cannot be read.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506
    except yaml.YAMLError as error:
        raise Problem(f"`{text}` is no value.", why=f"{error}".splitlines()[0] + ".", fix="quotes around it.") from error


def _override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    if not separator:
        raise Problem(f"`--set {override}` has no value.", why="it reads KEY=VALUE.", fix="`--set multiweight.sparsity=0.6`")
    value = parse_value(text)
    place, dot, name = key.partition(".")
    if not dot:
        return raw | {key: value}
    if place in ("calibration", "images"):
        return raw | {place: _mapping(raw, place) | {name: value}}
    steps = _steps(raw)
    ids = [_step_id(step) for step in steps]
    if place not in ids:
        raise Problem(
            f"`--set {override}`: there is no step {place!r}.", why=f"the steps are: {', '.join(ids)}.",
            fix=suggestion(place, ids) or "name a step by its id or method.",
        )  # fmt: skip
    return raw | {"steps": [step | {name: value} if _step_id(step) == place else step for step in steps]}


def resolve_step(step: dict[str, Any], number: int) -> Step:
    """Validates one step against its method's settings.

    Raises:
        Problem: On an unknown method or key, or a value out of range.
    """
    if not isinstance(step, dict) or "method" not in step:
        raise Problem(
            f"Step {number} has no `method`.", why=f"it reads {step!r}.", fix="`- method: multiweight`, then its settings."
        )
    if not re.fullmatch(r"\w[\w .-]*", _step_id(step)):
        raise Problem(
            f"Step {number} has the id {_step_id(step)!r}.",
            why="it becomes the name of a file.",
            fix="letters, digits, spaces, `-` and `_`.",
        )
    found = get_method(str(step["method"]))
    values = {key: value for key, value in step.items() if key not in ("method", "id")}
    return Step(
        id=_step_id(step), method=found.name, settings=parse_settings(found.settings, values, f"step {number} ({found.name})")
    )


def parse_settings(model: type[Settings], values: dict[str, Any], where: str) -> Settings:
    """Builds a settings object, turning validation errors into a ``Problem``."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explain(error, where, model) from error


def explain(error: ValidationError, where: str, model: type[BaseModel]) -> Problem:
    """The first error of a validation, in three parts, with a suggestion for a misspelt key."""
    first = error.errors()[0]
    cause = (first.get("ctx") or {}).get("error")
    if isinstance(cause, Problem):
        return Problem(f"{where}: {cause.what}", why=cause.why, fix=cause.fix)
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = [*model.model_fields, *(["text", "sequences", "length"] if key.startswith("calibration") else [])]
        return Problem(
            f"{where} has no key `{key}`.",
            why=f"its keys are: {', '.join(known)}.",
            fix=suggestion(key.rsplit(".", 1)[-1], known) or "`duramen methods NAME` explains each of them.",
        )
    branches = [
        other for other in error.errors() if other["loc"][:-1] == first["loc"][:-1] and other["input"] is first["input"]
    ]
    if len(branches) > 1:  # of a union: pydantic names each as if it were a key
        key = key.rpartition(".")[0]
    return Problem(
        f"{where}: `{key}` is {first.get('input')!r}.",
        why=f"{'; or '.join(branch['msg'] for branch in branches)}.",
        fix="`duramen methods NAME` lists types and defaults.",
    )


def dump_yaml(value: dict[str, Any]) -> str:
    """YAML with keys in the given order."""
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110))


def write_recipe(folder: Path, whole: dict[str, Any], lock: dict[str, Any], *, anew: bool = False) -> None:
    """Puts the recipe of a run down, and its lock, unless they are there or it is another one."""
    for name, content in (("recipe.yaml", whole), ("recipe.lock.yaml", lock)):
        if anew or not (folder / name).is_file():
            write_text(folder / name, dump_yaml(content))
