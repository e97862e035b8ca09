"""The story: train, plan, run, evaluate, compare, inspect, report. Thin; read it from top to bottom."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from duramen.assets import open_model
from duramen.calibrate import ranks
from duramen.dial import Choice, Target, judge, met, turn
from duramen.engine import Progress, carry_out, check_steps, load_results, opening, prepare, silent, versions
from duramen.evaluate.evaluate import Settings as EvaluateSettings
from duramen.evaluate.evaluate import apply as measure
from duramen.evaluate.evaluate import open_subject
from duramen.export.codes import check_codes
from duramen.export.hf import check_masks
from duramen.export.step import Settings as ExportSettings
from duramen.export.step import apply as export_to
from duramen.families.inventory import inventory
from duramen.families.model import BlockModel
from duramen.forecast import forecast
from duramen.hardware.machine import describe, forward_dtype, gigaflops
from duramen.opening import load
from duramen.order import check_order, marks_of
from duramen.problem import Exit, Problem
from duramen.reading import reading
from duramen.recipe import Recipe, load_recipe, parse_settings
from duramen.registry import get_method
from duramen.report.images import write_image_report
from duramen.report.overview import Line
from duramen.report.page import write_report
from duramen.report.stages import write_live
from duramen.rundir import RunDirectory
from duramen.shrink.groups import find_units, known_kinds
from duramen.stages import STAGES, divided, forecast_stages, run_stages
from duramen.sweeps import run_all

__all__ = [
    "choose",
    "compare",
    "compress",
    "evaluate",
    "export",
    "inspect",
    "load",
    "load_results",
    "plan",
    "report",
    "run",
    "sweep",
    "train",
    "versions",
]


SEARCHES = ("search", "search_masks", "vit_search")
"""Methods whose candidates workers can measure."""


def run(
    recipe: str | Path | dict[str, Any],
    model: str | Path,
    out: str | Path,
    *,
    overrides: list[str] | None = None,
    allow_generic: bool = False,
    progress: Progress = silent,
    workers: int = 0,
    address: str = "",
) -> dict[str, Any]:
    """Carries out a recipe, or goes on where an earlier run of the same line stopped.

    Args:
        recipe: Path, shipped name, or dictionary.
        model: Hugging Face folder, embedded name, GGUF file, or hub id.
        out: The run directory; becomes a Hugging Face folder with a report.
        overrides: ``step.key=value``, as with ``--set``.
        allow_generic: Whether to guess the layout of an unknown architecture.
        progress: Called with events.
        workers: Ray workers that measure the candidates of a search; 0 for this process alone. They change nothing but the time.
        address: Ray cluster that they belong to; empty for this machine.

    Returns:
        The content of ``results.json``.

    Raises:
        Problem: On a user's mistake; what was finished is kept.
    """
    model = str(model)
    with ranks.joined():
        loaded = load_recipe(recipe, overrides)
        _check_workers(loaded, workers, address)
        if loaded.images is not None:
            from duramen.vision.story import run_images

            command, team = _command("run", recipe, model, out, overrides), (workers, address)
            run_images(loaded, model, Path(out), command=command, versions=versions(), progress=progress, team=team)
            return load_results(Path(out))
        context, steps = prepare(loaded, model, Path(out), allow_generic, progress)
        context.workers, context.address = workers, address
        return carry_out(context, steps, model, _command("run", recipe, model, out, overrides))


def train(
    recipe: str | Path | dict[str, Any],
    out: str | Path,
    *,
    overrides: list[str] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Trains a model from text: the recipe's stages, and then its other steps on what they leave; the same line again goes on.

    Args:
        recipe: Path, shipped name, or dictionary; it begins with stages.
        out: The run directory; becomes a Hugging Face folder with a report, and ``stages`` beside it.
        overrides: ``step.key=value``, as with ``--set``.
        progress: Called with events.

    Returns:
        The content of ``results.json``.

    Raises:
        Problem: On a user's mistake; what was finished is kept.
    """
    with ranks.joined():
        loaded = load_recipe(recipe, overrides)
        stages, rest = divided(loaded)
        directory, after = RunDirectory(Path(out)), loaded.model_copy(update={"steps": tuple(rest)})
        following = after.resolved()
        check_steps(following, loaded.calibration.text)
        check_order(following)
        directory.check_free(STAGES)

        curves: dict[str, list[tuple[int, float]]] = {}

        def tell(event: str, **fields: Any) -> None:
            if not ranks.leads():
                return
            progress(event, fields)
            if event == "step":
                curves[f"{fields['number'] + 1}. {fields['method']}"] = []
            if event == "trained":
                list(curves.values())[-1].append((fields["steps"], fields["loss"]))
                write_live(directory.out / STAGES, {name: points for name, points in curves.items() if points})

        trained = run_stages(loaded, stages, directory.out, versions=versions(), tell=tell)
        context, steps = prepare(after, str(trained.model), directory.out, False, progress, loaded)
        made = trained.model.relative_to(directory.out).as_posix()
        return carry_out(context, steps, made, _command("train", recipe, "", out, overrides), trained.stages)


def _check_workers(recipe: Recipe, workers: int, address: str) -> None:
    """Stops where workers were asked for and have nothing to do, or an address without them."""
    if address and not workers:
        raise Problem("An address needs workers.", why="it says where they are.", fix="`--workers N --address ADDRESS`.")
    if workers and not any(step.method in SEARCHES for step in recipe.resolved()):
        raise Problem(
            f"{workers} workers have nothing to do in this recipe.",
            why=f"only {', '.join(SEARCHES)} have candidates to share out.",
            fix="the line without `--workers`; for several processes in other steps see torchrun in the docs.",
        )


def _command(verb: str, recipe: str | Path | dict[str, Any], model: str, out: str | Path, overrides: list[str] | None) -> str:
    named = str(Path(out) / "recipe.yaml") if isinstance(recipe, dict) else str(recipe)
    words = [named, model, str(out), *(f"--set={item}" for item in overrides or [])]
    return shlex.join(["duramen", verb, *filter(None, words)])


def plan(
    recipe: str | Path | dict[str, Any], model: str = "", *, overrides: list[str] | None = None, allow_generic: bool = False
) -> dict[str, Any]:
    """What a run would touch, need and take; see ``duramen.forecast``.

    Args:
        recipe: Path, shipped name, or dictionary.
        model: Folder, embedded name, GGUF file or hub id; none for a recipe that begins with stages of training.
        overrides: ``step.key=value``.
        allow_generic: Whether to guess the layout of an unknown architecture.
    """
    loaded = load_recipe(recipe, overrides)
    if any(get_method(step.method).kind == "train" for step in loaded.resolved()):
        return forecast_stages(loaded)
    if not model:
        raise Problem("A model is missing.", why="this recipe changes one that is there.", fix="`duramen plan RECIPE MODEL`")
    if loaded.images is not None:
        raise Problem(
            "Runs on images are not forecast.",
            why="their steps train and measure, whose time is the settings' own.",
            fix="`duramen run`; the same line again goes on where it stopped.",
        )
    steps = loaded.resolved()
    check_steps(steps, loaded.calibration.text)
    folder = open_model(model)
    check_order(steps, marks_of(folder))
    opened = BlockModel.from_folder(folder, allow_generic=allow_generic)
    head = {"recipe": loaded.name, "model": model, "family": opened.family.name, "blocks": len(opened.blocks)}
    return head | {"machine": describe()} | forecast(opened, loaded, steps, gigaflops=gigaflops(torch.float32))


def inspect(model: str, *, allow_generic: bool = False) -> dict[str, Any]:
    """What a model holds, and whether its masks are kept; see ``duramen.families.inventory``."""
    folder = open_model(model)
    with reading(folder):
        opened = BlockModel.from_folder(folder, allow_generic=allow_generic)
        groups = [units.describe() for units in find_units(opened, known_kinds(opened))]
        return (
            {"model": model}
            | inventory(opened)
            | {"masks": check_masks(opened), "codes": check_codes(opened), "groups": groups}
        )


def compress(
    model: str | Path,
    out: str | Path,
    *,
    target: str,
    place: str = "llama.cpp",
    text: tuple[str, ...] = ("boolq",),
    told: Callable[[Choice], None] = lambda choice: None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Plans a recipe for a target by itself, carries it out, and holds what was reached against what was asked for; see ``duramen.dial``.

    Args:
        model: Folder, embedded name, GGUF file or hub id.
        out: The run directory; the recipe lies in it as ``recipe.yaml``.
        target: ``0.5x``, ``200MB`` or ``2x-faster``.
        place: ``cpu``, ``gpu``, ``llama.cpp``, ``vllm`` or ``edge``.
        text: On what it is measured.
        told: Called with the recipe and its reasons before anything runs.
        progress: Called with events.

    Returns:
        The content of ``results.json``, and ``dial``: ``target``, ``reasons``, ``asked`` and ``reached`` (bytes, or a factor of speed), and both in words, ``said``.

    Raises:
        Problem: If the target is out of reach, or was missed by more than five percent; then the run is kept, and the nearest said.
    """
    choice = choose(model, target=target, place=place, text=text)
    told(choice)
    results = run(choice.recipe, model, out, progress=progress)
    asked, reached = judge(choice, results, Path(out))
    said = f"{choice.target.say(asked)} was asked for, and {choice.target.say(reached)} was reached."
    if not met(choice, asked, reached):
        raise Problem(
            said, why="what was predicted and what was measured differ by more than 5 %.",
            fix=f"the result is in {out}; `recipe.yaml` there can be changed and run again.", code=Exit.OUT_OF_BUDGET,
        )  # fmt: skip
    return results | {"dial": {"target": target, "reasons": choice.reasons, "asked": asked, "reached": reached, "said": said}}


def sweep(
    recipe: str | Path,
    model: str,
    out: str | Path,
    *,
    over: list[str],
    overrides: list[str] | None = None,
    trials: int | None = None,
    progress: Progress = silent,
) -> list[Line]:
    """Runs a recipe with every combination of some settings' values, or with so many that a study chooses; see ``duramen.sweeps``."""
    return run_all(run, recipe, model, Path(out), over, overrides, trials, progress=progress)


def choose(model: str | Path, *, target: str, place: str = "llama.cpp", text: tuple[str, ...] = ("boolq",)) -> Choice:
    """The recipe that ``compress`` would carry out, and why; the same arguments."""
    name = f"{Path(model).name}-{target}-for-{place}"
    return turn(BlockModel.from_folder(open_model(str(model))), name, Target.read(target), place, text)


def evaluate(model: str, *, allow_generic: bool = False, dtype: str = "auto", **settings: Any) -> dict[str, Any]:
    """Measures one model.

    Args:
        model: Folder, embedded name, GGUF file or hub id.
        allow_generic: Whether to guess the layout of an unknown architecture.
        dtype: Of forward passes.
        **settings: As in the step ``evaluate``.
    """
    chosen = parse_settings(EvaluateSettings, settings, "evaluate")
    subject = open_subject(open_model(model), **opening(forward_dtype(dtype), allow_generic))
    measured: dict[str, Any] = measure({"before": subject}, **chosen.model_dump())
    return {"model": model, "machine": describe()} | measured


def compare(first: str, second: str, *, allow_generic: bool = False, dtype: str = "auto", **settings: Any) -> dict[str, Any]:
    """Measures two models of one tokenizer on the same tokens, with paired differences; KL is taken from the first."""
    chosen = parse_settings(EvaluateSettings, settings, "compare")
    options = opening(forward_dtype(dtype), allow_generic)
    subjects = {name: open_subject(open_model(model), **options) for name, model in (("before", first), ("after", second))}
    measured: dict[str, Any] = measure(subjects, **chosen.model_dump())
    return {"before": first, "after": second, "machine": describe()} | measured


def export(form: str, model: str, out: str | Path, *, kind: str = "auto") -> dict[str, Any]:
    """Writes a model in a format that another program executes, and runs it there; see ``duramen.export.step``.

    Args:
        form: ``gguf``, ``onnx`` or ``compressed``.
        model: Folder, embedded name or hub id.
        out: The file or folder.
        kind: Type, as in the step ``export``.

    Raises:
        Problem: On another format or type, or if the model cannot be expressed in it.
    """
    chosen = parse_settings(ExportSettings, {"form": form, "type": kind}, "export")
    found: dict[str, Any] = export_to(open_model(model), Path(out), **chosen.model_dump())
    return {"model": model, "file": str(out)} | found


def report(run_folder: str | Path) -> Path:
    """Writes ``report.html`` of a finished run anew from its ``results.json``."""
    folder = Path(run_folder)
    results = load_results(folder)
    with reading(folder / "results.json"):
        return write_image_report(folder, results) if "images" in results else write_report(folder, results)
