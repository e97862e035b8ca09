"""The stages of a training from nothing: one after another, each in a folder of its own that says what went in, what came out, and on what it ran.

A stage is finished once its manifest is there, which is written last; what it holds is checked before it is used again. A stage that was stopped goes on where
it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duramen.calibrate import ranks
from duramen.hardware.clock import now
from duramen.hardware.energy import joules
from duramen.hardware.machine import describe
from duramen.problem import Exit, Problem
from duramen.reading import read_json, reading
from duramen.recipe import Recipe, Step
from duramen.registry import get_method
from duramen.rundir import RunDirectory, hash_folder, unlike, write_json
from duramen.train.forecast import forecast_pretraining
from duramen.train.pretrain import METRICS
from duramen.train.stage import DATA, MODEL, TOKENIZER, TOKENS, WORK, Stage

STAGES, MANIFEST, RECORD = "stages", "manifest.json", "record.json"
PASSED_ON = (DATA, TOKENS, TOKENIZER, MODEL)
ALONE = ("curate", "tokenize", "grow")
"""Stages that one process carries out while the others wait."""


@dataclass(frozen=True)
class Trained:
    """What the stages of a run left.

    Attributes:
        model: Folder of the last model.
        stages: For the report: of every stage its id, method, settings, seconds and what it found.
    """

    model: Path
    stages: list[dict[str, Any]]


def divided(recipe: Recipe) -> tuple[list[Step], list[dict[str, Any]]]:
    """The stages of a recipe, and the steps that follow.

    Raises:
        Problem: If there is no stage, or one comes after another kind of step.
    """
    steps = recipe.resolved()
    stages = [get_method(step.method).kind == "train" for step in steps]
    count = sum(stages)
    if not count:
        raise Problem(
            "This recipe trains nothing.", why="`duramen train` begins with stages such as `curate` and `pretrain`.",
            fix="`duramen run RECIPE MODEL OUT` for a model that is there.",
        )  # fmt: skip
    if not all(stages[:count]):
        late = next(step.method for step, stage in zip(steps[count:], stages[count:], strict=True) if stage)
        raise Problem(
            f"The stage `{late}` comes after steps that change or measure a model.", why="those work on what the stages leave.",
            fix="all stages first.",
        )  # fmt: skip
    _check_decontaminated(steps)
    return steps[:count], list(recipe.steps[count:])


def _check_decontaminated(steps: list[Step]) -> None:
    """Stops where the model would be measured on what it may have learned.

    Raises:
        Problem: Then.
    """
    cleared: set[str] = {name for step in steps if step.method == "curate" for name in step.settings.decontaminate}
    if not any(step.method == "curate" for step in steps):
        return
    for step in steps:
        if step.method == "evaluate":
            missing = sorted({*step.settings.tasks, *step.settings.text} - cleared)
            if missing:
                raise Problem(
                    f"The model would be measured on {', '.join(missing)}, and its text was not cleared of that.",
                    why="what a model has learned by heart says nothing.", fix=f"`decontaminate: [{', '.join(missing)}]` in the stage `curate`.",
                )  # fmt: skip


def run_stages(recipe: Recipe, steps: list[Step], out: Path, *, versions: dict[str, str], tell: Callable[..., None]) -> Trained:
    """Carries the stages out, or goes on.

    Args:
        recipe: Has the seed.
        steps: The stages.
        out: The run directory; they are in its folder ``stages``.
        versions: Of the packages that decide a result.
        tell: Called with events.

    Raises:
        Problem: On a user's mistake, a stage that was changed since, or an earlier run that differs.
    """
    directory = RunDirectory(out / STAGES)
    places = [(f"{number:02d}-{step.id}", step.fingerprint()) for number, step in enumerate(steps)]
    if ranks.leads():
        begun = RunDirectory(out).fingerprint  # of the steps that work on what the stages left
        changes = directory.claim({"seed": recipe.seed, "versions": versions}, places, until=begun)
        if changes:
            tell("changed", steps=changes)
    ranks.wait()
    given: dict[str, Path] = {}
    found = []
    for number, step in enumerate(steps):
        tell("step", method=step.method, number=number, of=len(steps))
        folder = directory.out / places[number][0]
        stage = Stage(
            folder,
            dict(given),
            recipe.seed,
            lambda done, loss: tell("trained", steps=done, loss=loss),
            lambda text: tell("part", part=text),
        )
        found.append(_finished(stage, step, versions))
        given |= {name: folder / name for name in PASSED_ON if (folder / name).is_dir()}
    if MODEL not in given:
        raise Problem("No stage leaves a model.", why="the recipe ends before `pretrain`.", fix="a stage that trains.")
    return Trained(given[MODEL], found)


def _finished(stage: Stage, step: Step, versions: dict[str, str]) -> dict[str, Any]:
    """What a stage found, now or earlier."""
    manifest = stage.folder / MANIFEST
    if ranks.shared(manifest.is_file()):
        if ranks.leads():
            check_stage(stage.folder)
    else:
        if ranks.leads():
            stage.folder.mkdir(parents=True, exist_ok=True)
        ranks.wait()
        begun, energy = now(), joules()
        alone = step.method in ALONE
        record = get_method(step.method).apply(stage, step.settings) if ranks.leads() or not alone else {}
        spent, used = now() - begun, joules()
        if ranks.leads():
            write_json(stage.folder / RECORD, record)
            write_json(manifest, {
                "schema": "duramen-stage/1", "id": step.id, "method": step.method, "settings": step.lock(), "seed": stage.seed,
                "inputs": {name: hash_folder(folder) for name, folder in stage.given.items()}, "outputs": _outputs(stage.folder),
                "versions": versions, "machine": describe(), "processes": ranks.count(), "seconds": spent,
                "joules": None if energy is None or used is None else used - energy,
            })  # fmt: skip
        ranks.wait()
    if ranks.leads():
        shutil.rmtree(stage.folder / WORK, ignore_errors=True)
    kept, record = read_json(manifest), read_json(stage.folder / RECORD)
    return {key: kept[key] for key in ("id", "method", "settings", "seconds", "joules")} | {"found": record}


def _outputs(folder: Path) -> dict[str, str]:
    """Hashes of what a stage left, but for what holds times."""
    return {
        name: digest
        for name, digest in hash_folder(folder).items()
        if name not in (RECORD, METRICS, MANIFEST) and not name.startswith(f"{WORK}/")
    }


def check_stage(folder: Path) -> None:
    """Whether a finished stage still is what it was.

    Raises:
        Problem: If a file is missing or was changed; it is named.
    """
    with reading(folder / MANIFEST):
        changed = unlike(folder, read_json(folder / MANIFEST)["outputs"])
    for name, state in changed.items():
        raise Problem(
            f"{folder.name}/{name} {state}.", why="the stages after it were made from it, or are about to be.",
            fix=f"put the file back, or remove {folder} and the stages after it to make them anew.", code=Exit.CHECK_FAILED,
        )  # fmt: skip


def forecast_stages(recipe: Recipe) -> dict[str, Any]:
    """What the stages of a recipe will take, as far as it can be said before they run: see ``duramen.train.forecast``.

    Args:
        recipe: With stages.
    """
    steps, rest = divided(recipe)
    found: list[dict[str, Any]] = []
    for step in steps:
        entry: dict[str, Any] = {"id": step.id, "method": step.method}
        if step.method == "pretrain" and step.settings.model:
            vocabulary = next((each.settings.vocabulary for each in steps if each.method == "tokenize"), 0)
            entry |= forecast_pretraining(step.settings, vocabulary)
        found.append(entry)
    return {"recipe": recipe.name, "stages": found, "then": [step["method"] for step in rest]}
