"""The story: plan, run, evaluate, compare, inspect, report. Thin; read it from top to bottom."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duramen.assets import open_model
from duramen.calibrate import ranks
from duramen.calibrate.tokens import calibration_tokens
from duramen.calibrate.walker import SCRATCH, Memo, Records, Walk
from duramen.evaluate.evaluate import Settings as EvaluateSettings
from duramen.evaluate.evaluate import Subject, check_texts, open_subject
from duramen.evaluate.evaluate import apply as measure
from duramen.export.card import write_card
from duramen.export.codes import check_codes
from duramen.export.hf import annotate, assemble, check_masks, copy_other_files, publish, verify_logits
from duramen.export.step import Settings as ExportSettings
from duramen.export.step import apply as export_to
from duramen.families.checkpoint import Checkpoint
from duramen.families.inventory import inventory
from duramen.families.model import BlockModel
from duramen.forecast import forecast
from duramen.hardware.machine import describe, fastest_device, forward_dtype, free_memory, gigaflops, peak_memory
from duramen.opening import load
from duramen.problem import Exit, Problem
from duramen.recipe import Recipe, Step, load_recipe, parse_settings, write_recipe
from duramen.registry import get_method
from duramen.report.images import write_image_report
from duramen.report.page import write_report
from duramen.rundir import BlockStore, RunDirectory, hash_model, hash_tokens, read_formats, write_json
from duramen.shrink.groups import find_units, known_kinds
from duramen.tokens.folder import no_likelihood

__all__ = ["compare", "evaluate", "export", "inspect", "load", "load_results", "plan", "report", "run", "versions"]

Progress = Callable[[str, dict[str, Any]], None]
"""(event, fields); events are step, layer, trained, part, evaluating, saved and done."""


def _silent(event: str, fields: dict[str, Any]) -> None:
    return


@dataclass
class Context:
    """What the steps of one run share: the folders, the recipe, the tokens and where to report."""

    recipe: Recipe
    source: Path
    directory: RunDirectory
    tokens: Tensor
    dtype: torch.dtype
    allow_generic: bool
    progress: Progress
    workers: int = 0
    address: str = ""

    def tell(self, event: str, **fields: Any) -> None:
        """Reports an event to the display and to ``log.jsonl``."""
        if ranks.leads():
            self.directory.log(event, **fields)
            self.progress(event, fields)


def run(
    recipe: str | Path | dict[str, Any],
    model: str | Path,
    out: str | Path,
    *,
    overrides: list[str] | None = None,
    allow_generic: bool = False,
    progress: Progress = _silent,
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
        if loaded.images is not None:
            from duramen.vision.story import run_images

            command = _command(recipe, model, out, overrides)
            run_images(loaded, model, Path(out), command=command, versions=versions(), progress=progress)
            return load_results(Path(out))
        _check_workers(loaded, workers, address)
        context, steps = _prepare(loaded, model, Path(out), allow_generic, progress)
        context.workers, context.address = workers, address
        return _run(context, steps, model, _command(recipe, model, out, overrides))


def _check_workers(recipe: Recipe, workers: int, address: str) -> None:
    """Stops where workers were asked for and have nothing to do, or an address without them."""
    if address and not workers:
        raise Problem("An address needs workers.", why="it says where they are.", fix="`--workers N --address ADDRESS`.")
    if workers and not any(get_method(step.method).kind == "search" for step in recipe.resolved()):
        raise Problem(
            f"{workers} workers have nothing to do in this recipe.",
            why="only the steps of a search have candidates to share out.",
            fix="the line without `--workers`; for several processes in other steps see torchrun in the docs.",
        )


def _run(context: Context, steps: list[Step], model: str, command: str) -> dict[str, Any]:
    """The run; under torchrun all ranks walk together, and the first one measures and writes."""
    out = context.directory.out
    finished = out / "manifest.json"
    if ranks.shared(finished.is_file()):
        context.tell("done", out=str(out), again=True)
        return load_results(out)
    folder, results = context.source, _new_results(context, model, command)
    for number, step in enumerate(steps):
        place = f"step-{number:02d}-{step.id}"
        context.tell("step", method=step.method, number=number, of=len(steps))
        kind = get_method(step.method).kind
        if kind == "export":
            results["exports"].append(_export(context, folder, step, place))
        elif kind == "reduce":
            folder = _reduce(context, folder, step, place, results)
        elif kind != "evaluate":
            folder = _transform(context, folder, step, place, results)
        elif ranks.leads():
            subjects = _subjects(context, folder)
            results["evaluations"].append(measure(subjects, memo=_told(context, place), **step.settings.model_dump()))
    if ranks.leads():
        _finish(context, folder, model, results)
    ranks.wait()
    return load_results(out)


def _prepare(recipe: Recipe, model: str, out: Path, allow_generic: bool, progress: Progress) -> tuple[Context, list[Step]]:
    steps = recipe.resolved()
    for step in steps:
        if get_method(step.method).kind == "images":
            raise Problem(
                f"`{step.method}` needs images.",
                why="this recipe has texts.",
                fix="`images:` with `data: fashion-mnist`, or a folder, in the recipe.",
            )
    source = ranks.shared(open_model(model) if ranks.leads() else None)
    Checkpoint(source)
    tokens = _tokens(recipe, source)
    directory = RunDirectory(out)
    wanted = directory.recorded("recipe", "dtype") if recipe.dtype == "auto" else recipe.dtype
    dtype = ranks.shared(forward_dtype(wanted) if ranks.leads() else None)
    shortened = False
    for step in steps:
        shortened = shortened or get_method(step.method).kind == "reduce"
        if isinstance(step.settings, EvaluateSettings):
            check_texts(step.settings, recipe.calibration.text)
            if shortened and step.settings.text and not step.settings.context:
                raise no_likelihood()
    context = Context(recipe, source, directory, tokens, dtype, allow_generic, progress)
    if ranks.leads():
        _claim(context, _lock(recipe, steps, dtype))
    ranks.wait()
    return context, steps


def _claim(context: Context, lock: dict[str, Any]) -> None:
    """Takes the run directory for this run and writes down what it is."""
    directory, source = context.directory, context.source
    directory.claim({
        "model": hash_model(source, ".json", ".safetensors"),
        "calibration tokens": hash_tokens(context.tokens),
        "recipe": lock,
        "versions": versions(),
    })  # fmt: skip
    for left_over in directory.state.glob(f"{SCRATCH}*"):
        shutil.rmtree(left_over)
    write_recipe(directory.out, context.recipe.model_dump(mode="json"), lock)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise Problem(
            f"{folder} has no tokenizer that opens.", why="recipes of texts read them by the model's own.",
            fix="the folder with its `tokenizer.json`; a model of images needs a recipe with `images`.",
            code=Exit.INCOMPATIBLE,
        ) from error  # fmt: skip


def _tokens(recipe: Recipe, source: Path) -> Tensor:
    wanted = recipe.calibration
    return calibration_tokens(
        _tokenizer(source), wanted.text, sequences=wanted.sequences, length=wanted.length, seed=recipe.seed
    )


def _lock(recipe: Recipe, steps: list[Step], dtype: torch.dtype) -> dict[str, Any]:
    whole = recipe.model_dump(mode="json")
    del whole["calibration"]["activation_memory"]
    return whole | {"dtype": str(dtype).removeprefix("torch."), "steps": [step.lock() for step in steps]}


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    return {name: importlib.metadata.version(name) for name in ("duramen", "torch", "transformers", "safetensors")}


def _command(recipe: str | Path | dict[str, Any], model: str, out: str | Path, overrides: list[str] | None) -> str:
    named = "recipe.yaml" if isinstance(recipe, dict) else str(recipe)
    return shlex.join(["duramen", "run", named, model, str(out), *(f"--set={item}" for item in overrides or [])])


def _new_results(context: Context, model: str, command: str) -> dict[str, Any]:
    return {
        "schema": "duramen-results/1",
        "command": command,
        "recipe": context.recipe.name,
        "model": model,
        "machine": describe(),
        "versions": versions(),
        "calibration": context.recipe.calibration.model_dump(mode="json") | {"tokens": context.tokens.numel()},
        "steps": [],
        "evaluations": [],
        "exports": [],
    }


def _told(context: Context, place: str) -> Callable[[str, Callable[[], Any]], Any]:
    """The memo of an evaluation, which also reports each part."""
    remember = context.directory.memo(place)

    def part(key: str, compute: Callable[[], Any]) -> Any:
        context.tell("evaluating", part=key)
        return remember(key, compute)

    return part


def _kept(context: Context, place: str) -> Memo:
    """The memo of an editing step: all ranks compute together, the first one keeps."""
    remember = context.directory.memo(place)

    def part(key: str, compute: Callable[[], Any]) -> Any:
        if not ranks.shared(context.directory.remembers(place, key)):
            found = compute()
            if ranks.leads():
                remember(key, lambda: found)
            context.tell("part", part=key)
            ranks.wait()
        return remember(key, dict)

    return part


def _opening(dtype: torch.dtype, allow_generic: bool) -> dict[str, Any]:
    """How models are opened to compute with."""
    return {"dtype": dtype, "device": fastest_device(), "allow_generic": allow_generic}


def _subjects(context: Context, folder: Path) -> dict[str, Subject]:
    options = _opening(context.dtype, context.allow_generic)
    before = open_subject(context.source, **options)
    return {"before": before} if folder == context.source else {"before": before, "after": open_subject(folder, **options)}


def _transform(context: Context, folder: Path, step: Step, place: str, results: dict[str, Any]) -> Path:
    """Applies one editing step: walks the blocks; then one rank assembles the folder, reopens it and compares logits."""
    opened = BlockModel.from_folder(folder, **_opening(context.dtype, context.allow_generic))
    assert opened.checkpoint is not None
    store = BlockStore(context.directory.state / place, opened.stored_name)
    walk = Walk(
        activation_memory=round(context.recipe.calibration.activation_memory * 2**30),
        scratch=context.directory.state,
        store=store,
        memo=_kept(context, place),
        folder=context.directory.state / place,
        parent=None if folder == context.source else context.source,
        workers=context.workers,
        address=context.address,
        told=lambda step, loss: context.tell("trained", steps=step, loss=loss),
        progress=lambda record: context.tell("layer", blocks=len(opened.blocks), **record),
    )
    records = get_method(step.method).apply(opened, context.tokens, walk=walk, **step.settings.model_dump())
    target = context.directory.state / place / "model"
    if ranks.leads():
        results["steps"].append(_assemble(context, opened, store, step, walk, records, target))
    ranks.wait()
    return target


def _reduce(context: Context, folder: Path, step: Step, place: str, results: dict[str, Any]) -> Path:
    """Applies a step that changes how a model reads: the weights stay, and a file beside them says how."""
    opened = BlockModel.from_folder(folder, **_opening(context.dtype, context.allow_generic))
    walk, target = Walk(memo=_kept(context, place)), context.directory.state / place / "model"
    found = get_method(step.method).apply(opened, context.tokens, walk=walk, **step.settings.model_dump())
    if ranks.leads():
        annotate(folder, target, walk.files)
        check = _reopened(context, opened, walk, target, last=1)
        sample, tokenizer = found["sample"], _tokenizer(folder)
        sample["pieces"] = [tokenizer.decode([token]) for token in sample.pop("ids")]
        record = {"id": step.id, "method": step.method, "settings": step.lock(), "reopened": check, "layers": []}
        results["steps"].append(record | {"reduction": found})
    ranks.wait()
    return target


def _export(context: Context, folder: Path, step: Step, place: str) -> dict[str, Any]:
    """Writes what there is so far for another program, into ``exports``; once finished it is not written again."""
    assert isinstance(step.settings, ExportSettings)
    name = f"{step.id}.gguf" if step.settings.form == "gguf" else step.id
    target = context.directory.out / "exports" / name

    def write() -> dict[str, Any]:
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = export_to(folder, target, **step.settings.model_dump())
        return {"file": f"exports/{name}"} | found

    found: dict[str, Any] = dict(_told(context, place)("export", write)) if ranks.leads() else {}
    ranks.wait()
    return found


def _assemble(
    context: Context, opened: BlockModel, store: BlockStore, step: Step, walk: Walk, records: Records, target: Path
) -> dict[str, Any]:
    assert opened.checkpoint is not None
    copied = assemble(
        opened.checkpoint, store, len(opened.blocks), target, walk.reshape, walk.files, opened.by_stored_name(walk.outside)
    )
    check = _reopened(context, opened, walk, target)
    edited = {record["layer"] for record in records}
    return {
        "id": step.id, "method": step.method, "settings": step.lock(), "reopened": check, "layers": records,
        "skipped": [name for name in opened.layer_names() if name not in edited], "copied_unchanged": copied,
        "shape": walk.reshape.summary if walk.reshape else None, "training": walk.training, "said": walk.said,
        "rounds": dict(Counter(each.text for each in read_formats(target).values() if each.runs)),
    }  # fmt: skip


def _reopened(context: Context, opened: BlockModel, walk: Walk, target: Path, **options: int) -> dict[str, Any]:
    """What the check of a saved folder found."""
    assert walk.final_hidden is not None
    assert walk.first_batch is not None
    fits = min(peak_memory(), free_memory(opened.device))
    check = verify_logits(target, opened, walk.final_hidden, walk.first_batch, whole_up_to=fits, **options)
    context.tell("saved", folder=str(target), **check)
    return check


def _finish(context: Context, folder: Path, model: str, results: dict[str, Any]) -> None:
    directory = context.directory
    if folder == context.source:
        copy_other_files(folder, directory.out)
    else:
        publish(folder, directory.out)
    results["peak_memory_bytes"] = peak_memory()
    write_json(directory.out / "results.json", results)
    write_card(directory.out, results)
    write_report(directory.out, results)
    source = hash_model(context.source, ".safetensors")
    directory.write_manifest(parent={"model": model, "files": source}, versions=versions(), seed=context.recipe.seed)
    context.tell("done", out=str(directory.out), again=False)


def plan(
    recipe: str | Path | dict[str, Any], model: str, *, overrides: list[str] | None = None, allow_generic: bool = False
) -> dict[str, Any]:
    """What a run would touch, need and take; see ``duramen.forecast``.

    Args:
        recipe: Path, shipped name, or dictionary.
        model: Folder, embedded name, GGUF file or hub id.
        overrides: ``step.key=value``.
        allow_generic: Whether to guess the layout of an unknown architecture.
    """
    loaded = load_recipe(recipe, overrides)
    if loaded.images is not None:
        raise Problem(
            "Runs on images are not forecast.",
            why="their steps train and measure, whose time is the settings' own.",
            fix="`duramen run`; the same line again goes on where it stopped.",
        )
    steps = loaded.resolved()
    opened = BlockModel.from_folder(open_model(model), allow_generic=allow_generic)
    head = {"recipe": loaded.name, "model": model, "family": opened.family.name, "blocks": len(opened.blocks)}
    return head | {"machine": describe()} | forecast(opened, loaded, steps, gigaflops=gigaflops(torch.float32))


def inspect(model: str, *, allow_generic: bool = False) -> dict[str, Any]:
    """What a model holds, and whether its masks are kept; see ``duramen.families.inventory``."""
    opened = BlockModel.from_folder(open_model(model), allow_generic=allow_generic)
    groups = [units.describe() for units in find_units(opened, known_kinds(opened))]
    return {"model": model} | inventory(opened) | {"masks": check_masks(opened), "codes": check_codes(opened), "groups": groups}


def evaluate(model: str, *, allow_generic: bool = False, dtype: str = "auto", **settings: Any) -> dict[str, Any]:
    """Measures one model.

    Args:
        model: Folder, embedded name, GGUF file or hub id.
        allow_generic: Whether to guess the layout of an unknown architecture.
        dtype: Of forward passes.
        **settings: As in the step ``evaluate``.
    """
    chosen = parse_settings(EvaluateSettings, settings, "evaluate")
    subject = open_subject(open_model(model), **_opening(forward_dtype(dtype), allow_generic))
    measured: dict[str, Any] = measure({"before": subject}, **chosen.model_dump())
    return {"model": model, "machine": describe()} | measured


def compare(first: str, second: str, *, allow_generic: bool = False, dtype: str = "auto", **settings: Any) -> dict[str, Any]:
    """Measures two models of one tokenizer on the same tokens, with paired differences; KL is taken from the first."""
    chosen = parse_settings(EvaluateSettings, settings, "compare")
    options = _opening(forward_dtype(dtype), allow_generic)
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
    return write_image_report(folder, results) if "images" in results else write_report(folder, results)


def load_results(folder: Path) -> dict[str, Any]:
    """Reads ``results.json`` of a run.

    Raises:
        Problem: If the folder holds no finished run.
    """
    file = folder / "results.json"
    if not file.is_file():
        raise Problem(
            f"{folder} has no results.json.", why="the run is not finished, or this is no run directory.",
            fix="run the same `duramen run` line again; it goes on where it stopped.",
        )  # fmt: skip
    return dict(json.loads(file.read_text(encoding="utf-8")))
