"""Sweeps: one recipe with several values for some settings, every combination a run of its own, and one page of all with the front of size against quality.

A grid runs all combinations; a study runs some of them, which Optuna chooses by what those before have shown.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from duramen.assets import open_model
from duramen.problem import Problem, need
from duramen.recipe import load_recipe, parse_value
from duramen.report.overview import Line, summarise, write_overview
from duramen.rundir import RunDirectory

POINTS, PAGE = "points", "index.html"
MOST = 200
"""Runs that a sweep may have."""
DRAWN = 8
"""Runs of a study that are drawn at random, before others are chosen by what these have shown."""
ASKED = 20
"""Times that a study may be asked for each of its runs: it proposes what it knows again where it is sure."""


def axes(over: list[str]) -> list[list[str]]:
    """``step.key=[a, b]`` as the overrides ``step.key=a`` and ``step.key=b``, one list for each.

    Raises:
        Problem: If one reads otherwise, or there is none.
    """
    found: list[list[str]] = []
    for each in over:
        key, separator, text = each.partition("=")
        values = parse_value(text) if separator else None
        if not isinstance(values, list) or not values:
            raise Problem(
                f"`--over {each}` has no values.",
                why="it reads STEP.KEY=[VALUE, VALUE].",
                fix="`--over multiweight.sparsity=[0.4, 0.5, 0.6]`",
            )
        found.append([f"{key}={_written(value)}" for value in values])
    if not found:
        raise Problem(
            "Nothing is varied.",
            why="a sweep is over the values of settings.",
            fix="`--over multiweight.sparsity=[0.4, 0.5, 0.6]`",
        )
    return found


def _written(value: Any) -> str:
    """A value as an override spells it."""
    plain = isinstance(value, str) and _reads_as(value, value)
    return value if plain else json.dumps(value)


def _reads_as(text: str, value: Any) -> bool:
    try:
        return bool(parse_value(text) == value)
    except Problem:
        return False


@dataclass
class Grid:
    """Every combination, in order.

    Args:
        axes: The values of every setting.

    Raises:
        Problem: If there are too many.
    """

    axes: list[list[str]]

    def __post_init__(self) -> None:
        if self.count > MOST:
            raise Problem(
                f"{self.count} combinations are too many.",
                why=f"each is a run of its own, and a sweep has at most {MOST}.",
                fix="fewer values, or `--trials 30`, which runs the most promising ones.",
            )

    @property
    def count(self) -> int:
        """Of the runs."""
        return math.prod(map(len, self.axes))

    def checked(self) -> Iterator[list[str]]:
        """What has to be a recipe before anything runs."""
        return iter(self)

    def __iter__(self) -> Iterator[list[str]]:
        yield from map(list, itertools.product(*self.axes))

    def tell(self, each: list[str], line: Line) -> None:
        """Nothing follows from a run."""


@dataclass
class Study:
    """Some of the combinations, of which each is chosen by the size and the quality of those before it.

    Optuna's multi-objective tree-structured Parzen estimator does it, in the order in which an axis has its values, after some runs at random. Its seed
    is fixed, so that a sweep which goes on, perhaps to more runs, asks for the same ones again and finds them finished.

    Args:
        axes: The values of every setting.
        count: Of the runs.
    """

    axes: list[list[str]]
    count: int
    told: dict[tuple[str, ...], tuple[float, float] | None] = field(default_factory=dict)
    """Size and quality of every combination that ran; None where there are none."""

    def __post_init__(self) -> None:
        need("A study", "optuna", install="optuna")

    def checked(self) -> Iterator[list[str]]:
        """Every value, beside the first ones of the others."""
        first = [axis[0] for axis in self.axes]
        for number, axis in enumerate(self.axes):
            for value in axis:
                yield [*first[:number], value, *first[number + 1 :]]

    def __iter__(self) -> Iterator[list[str]]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=DRAWN)
        study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        ranges = {str(number): optuna.distributions.IntDistribution(0, len(axis) - 1) for number, axis in enumerate(self.axes)}
        for _ in range(ASKED * self.count):
            trial = study.ask(ranges)
            each = [axis[trial.params[name]] for axis, name in zip(self.axes, ranges, strict=True)]
            if tuple(each) not in self.told:
                yield each
            found = self.told[tuple(each)]
            state = optuna.trial.TrialState.COMPLETE if found else optuna.trial.TrialState.FAIL
            study.tell(trial, found, state=state)
            if len(self.told) == self.count:
                return

    def tell(self, each: list[str], line: Line) -> None:
        """What came of a combination."""
        known = math.isfinite(line.size) and math.isfinite(line.quality)
        self.told[tuple(each)] = (line.size, line.quality) if known else None


def run_all(
    run: Callable[..., dict[str, Any]],
    recipe: str | Path,
    model: str,
    out: Path,
    over: list[str],
    overrides: list[str] | None = None,
    trials: int | None = None,
    **options: Any,
) -> list[Line]:
    """Runs every combination that has not run yet, or so many of them, and writes ``index.html`` after each.

    Args:
        run: ``duramen.run``.
        recipe: Path, shipped name, or dictionary.
        model: Folder, embedded name, GGUF file, or hub id.
        out: The folder; runs lie in ``points``.
        over: ``step.key=[a, b]``, repeated.
        overrides: ``step.key=value``, for all.
        trials: How many combinations a study chooses; all of them without.
        **options: Of ``run``.

    Returns:
        The runs as they stand on the page; a combination that was refused is among them, with the reason.

    Raises:
        Problem: If a combination is no recipe, or the folder holds another sweep.
    """
    varied, fixed = axes(over), overrides or []
    whole = math.prod(map(len, varied))
    chosen = Grid(varied) if trials is None or trials >= whole else Study(varied, min(trials, MOST))
    for each in chosen.checked():
        load_recipe(recipe, [*fixed, *each])
    base = load_recipe(recipe, fixed)
    if base.images is None:
        open_model(model)
    directory = RunDirectory(out)
    directory.claim({"recipe": base.model_dump(mode="json"), "model": model, "over": over})
    lines: list[Line] = []
    for each in chosen:
        number = 0
        for axis, value in zip(varied, each, strict=True):
            number = number * len(axis) + axis.index(value)
        place = f"{POINTS}/{number:03d}-{re.sub(r'[^A-Za-z0-9.=-]+', '-', ','.join(each))[:80]}"
        name = ", ".join(item.partition(".")[2] or item for item in each)
        try:
            run(recipe, model, out / place, overrides=[*fixed, *each], **options)
            lines.append(summarise(out / place, place, name))
        except Problem as problem:
            lines.append(replace(Line(place, name), wrong=problem.what, report=False))
        chosen.tell(each, lines[-1])
        done = f"{len(lines)} of {chosen.count} combinations of {', '.join(item.partition('=')[0] for item in over)}"
        done += f", chosen from {whole} by a study." if chosen.count < whole else "."
        write_overview(out / PAGE, f"{base.name} on {model}", lines, done)
    return lines
