"""Sweeps: one recipe with several values for some settings, every combination a run of its own, and one page of all with the front of size against quality."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from duramen.problem import Problem
from duramen.recipe import load_recipe, parse_value
from duramen.report.overview import Line, summarise, write_overview
from duramen.rundir import RunDirectory

POINTS, PAGE = "points", "index.html"
MOST = 200
"""Combinations that a sweep may have."""


def combinations(over: list[str]) -> list[list[str]]:
    """Every combination of ``step.key=[a, b]`` as overrides of one run.

    Raises:
        Problem: If one reads otherwise, or there are too many.
    """
    axes: list[list[str]] = []
    for each in over:
        key, separator, text = each.partition("=")
        values = parse_value(text) if separator else None
        if not isinstance(values, list) or not values:
            raise Problem(
                f"`--over {each}` has no values.",
                why="it reads STEP.KEY=[VALUE, VALUE].",
                fix="`--over multiweight.sparsity=[0.4, 0.5, 0.6]`",
            )
        axes.append([f"{key}={_written(value)}" for value in values])
    if not axes:
        raise Problem(
            "Nothing is varied.",
            why="a sweep is over the values of settings.",
            fix="`--over multiweight.sparsity=[0.4, 0.5, 0.6]`",
        )
    count = math.prod(map(len, axes))
    if count > MOST:
        raise Problem(
            f"{count} combinations are too many.",
            why=f"each is a run of its own, and a sweep has at most {MOST}.",
            fix="fewer values.",
        )
    return [list(chosen) for chosen in itertools.product(*axes)]


def _written(value: Any) -> str:
    """A value as an override spells it."""
    return value if isinstance(value, str) else json.dumps(value)


def run_all(
    run: Callable[..., dict[str, Any]],
    recipe: str | Path,
    model: str,
    out: Path,
    over: list[str],
    overrides: list[str] | None = None,
    **options: Any,
) -> list[Line]:
    """Runs every combination that has not run yet, and writes ``index.html`` after each.

    Args:
        run: ``duramen.run``.
        recipe: Path, shipped name, or dictionary.
        model: Folder, embedded name, GGUF file, or hub id.
        out: The folder; runs lie in ``points``.
        over: ``step.key=[a, b]``, repeated.
        overrides: ``step.key=value``, for all.
        **options: Of ``run``.

    Returns:
        The runs as they stand on the page; a combination that was refused is among them, with the reason.

    Raises:
        Problem: If a combination is no recipe, or the folder holds another sweep.
    """
    chosen, fixed = combinations(over), overrides or []
    for each in chosen:
        load_recipe(recipe, [*fixed, *each])
    base = load_recipe(recipe, fixed)
    directory = RunDirectory(out)
    directory.claim({"recipe": base.model_dump(mode="json"), "model": model, "over": over})
    lines: list[Line] = []
    for number, each in enumerate(chosen):
        place = f"{POINTS}/{number:03d}-{re.sub(r'[^A-Za-z0-9.=-]+', '-', ','.join(each))[:80]}"
        name = ", ".join(item.partition(".")[2] or item for item in each)
        try:
            run(recipe, model, out / place, overrides=[*fixed, *each], **options)
            lines.append(summarise(out / place, place, name))
        except Problem as problem:
            lines.append(replace(Line(place, name), wrong=problem.what, report=False))
        done = f"{number + 1} of {len(chosen)} combinations of {', '.join(item.partition('=')[0] for item in over)}."
        write_overview(out / PAGE, f"{base.name} on {model}", lines, done)
    return lines
