"""The steps of a recipe, one after another, on one model: prepared, carried out or taken from an earlier run, and brought to an end."""

from __future__ import annotations

import importlib.metadata
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
from duramen.evaluate.evaluate import Subject, check_texts, check_there, open_subject
from duramen.evaluate.evaluate import apply as measure
from duramen.export.card import write_card
from duramen.export.hf import annotate, assemble, copy_other_files, publish, verify_logits
from duramen.export.step import Settings as ExportSettings
from duramen.export.step import apply as export_to
from duramen.families.checkpoint import Checkpoint
from duramen.families.model import BlockModel
from duramen.forecast import forecast
from duramen.hardware.machine import describe, fastest_device, forward_dtype, free_memory, peak_memory
from duramen.order import check_order, marks_of
from duramen.problem import Exit, Problem
from duramen.reading import read_json
from duramen.recipe import Recipe, Step, write_recipe
from duramen.registry import get_method
from duramen.report.page import write_report
from duramen.rundir import EXPORTS, STATE, BlockStore, RunDirectory, hash_model, hash_tokens, read_formats, write_json
from duramen.stages import STAGES
from duramen.tokens.folder import no_likelihood

Progress = Callable[[str, dict[str, Any]], None]
"""(event, fields); events are skipped, changed, step, layer, trained, part, evaluating, saved and done."""


def silent(event: str, fields: dict[str, Any]) -> None:
    """Reports to nobody."""


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


def carry_out(
    context: Context, steps: list[Step], model: str, command: str, stages: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The run; under torchrun all ranks walk together, and the first one measures and writes.

    Args:
        context: Of ``prepare``.
        steps: In order.
        model: Its name, for reports.
        command: The line that is written down.
        stages: Of the training that made the model, for reports.

    Returns:
        The content of ``results.json``.
    """
    out = context.directory.out
    finished = out / "manifest.json"
    if ranks.shared(finished.is_file()):
        context.tell("done", out=str(out), again=True)
        return load_results(out)
    folder, results = context.source, _new_results(context, model, command) | {"stages": stages or []}
    for number, step in enumerate(steps):
        place = step.place(number)
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


def prepare(
    recipe: Recipe, model: str, out: Path, allow_generic: bool, progress: Progress, whole: Recipe | None = None
) -> tuple[Context, list[Step]]:
    """Opens what a recipe needs and takes the run directory.

    Args:
        recipe: Of steps on texts.
        model: Hugging Face folder, embedded name, GGUF file, or hub id.
        out: The run directory.
        allow_generic: Whether to guess the layout of an unknown architecture.
        progress: Called with events.
        whole: What is written down as the run's recipe, where the steps are not all of it; None for the same.

    Returns:
        What the steps share, and the steps.

    Raises:
        Problem: If a step does not belong here, the model cannot be opened, or the folder holds another run.
    """
    steps = recipe.resolved()
    check_steps(steps, recipe.calibration.text)
    source = ranks.shared(open_model(model) if ranks.leads() else None)
    check_order(steps, marks_of(source))
    Checkpoint(source)
    if ranks.leads() and len(steps) > 1 and not (out / "manifest.json").is_file():
        opened = BlockModel.from_folder(source, allow_generic=allow_generic)
        forecast(opened, recipe, steps, gigaflops=1.0)  # what a later step refuses is said before an earlier one computes
    reading = any(get_method(step.method).kind not in ("evaluate", "export") for step in steps)
    tokens = _tokens(recipe, source) if reading else torch.zeros(0, 0, dtype=torch.long)
    directory = RunDirectory(out)
    wanted = directory.recorded("recipe", "dtype") if recipe.dtype == "auto" else recipe.dtype
    dtype = ranks.shared(forward_dtype(wanted) if ranks.leads() else None)
    context = Context(recipe, source, directory, tokens, dtype, allow_generic, progress)
    if ranks.leads():
        _claim(context, steps, whole or recipe)
    ranks.wait()
    return context, steps


def check_steps(steps: list[Step], calibration: tuple[str, ...]) -> None:
    """Stops before anything is computed on what can be told without the model.

    Args:
        steps: All that follow, in order.
        calibration: Texts that nothing may be measured on.

    Raises:
        Problem: On steps that do not belong here, texts or tasks that are not there, exports of one name.
    """
    for step in steps:
        if get_method(step.method).kind == "train":
            raise Problem(
                f"`{step.method}` is a stage of training.",
                why="it makes a model, and `duramen run` is given one.",
                fix="`duramen train RECIPE OUT`",
            )
        if get_method(step.method).kind == "images":
            raise Problem(
                f"`{step.method}` needs images.",
                why="this recipe has texts.",
                fix="`images:` with `data: fashion-mnist`, or a folder, in the recipe.",
            )
    targets = [_export_name(step) for step in steps if get_method(step.method).kind == "export"]
    if len(set(targets)) < len(targets):
        raise Problem(
            f"Two exports would both be `exports/{next(name for name in targets if targets.count(name) > 1)}`.",
            why="each is called by the `id` of its step.", fix="an `id` of its own for each of them.",
        )  # fmt: skip
    shortened = False
    for step in steps:
        shortened = shortened or get_method(step.method).kind == "reduce"
        if isinstance(step.settings, EvaluateSettings):
            check_there(step.settings)
            check_texts(step.settings, calibration)
            if shortened and step.settings.text and not step.settings.context:
                raise no_likelihood()


def _claim(context: Context, steps: list[Step], whole: Recipe) -> None:
    """Takes the run directory for this run and writes down what it is."""
    directory, source = context.directory, context.source
    fingerprint = {
        "model": hash_model(source, ".json", ".safetensors"),
        "calibration tokens": hash_tokens(context.tokens),
        "recipe": _lock(context.recipe, [], context.dtype),
        "versions": versions(),
    }
    places = [(f"{STATE}/{step.place(number)}", step.fingerprint()) for number, step in enumerate(steps)]
    changes = directory.claim(fingerprint, places, beside=(STAGES,))
    if changes:
        context.tell("changed", steps=changes)
    for left_over in directory.state.glob(f"{SCRATCH}*"):
        shutil.rmtree(left_over)
    lock = _lock(whole, whole.resolved(), context.dtype)
    write_recipe(directory.out, whole.model_dump(mode="json"), lock, anew=bool(changes))


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


def opening(dtype: torch.dtype, allow_generic: bool) -> dict[str, Any]:
    """How models are opened to compute with."""
    return {"dtype": dtype, "device": fastest_device(), "allow_generic": allow_generic}


def _subjects(context: Context, folder: Path) -> dict[str, Subject]:
    options = opening(context.dtype, context.allow_generic)
    before = open_subject(context.source, **options)
    return {"before": before} if folder == context.source else {"before": before, "after": open_subject(folder, **options)}


def _transform(context: Context, folder: Path, step: Step, place: str, results: dict[str, Any]) -> Path:
    """Applies one editing step: walks the blocks; then one rank assembles the folder, reopens it and compares logits."""
    opened = BlockModel.from_folder(folder, **opening(context.dtype, context.allow_generic))
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
    opened = BlockModel.from_folder(folder, **opening(context.dtype, context.allow_generic))
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


def _export_name(step: Step) -> str:
    """Of its file or folder."""
    return f"{step.id}.gguf" if step.settings.form == "gguf" else step.id


def _export(context: Context, folder: Path, step: Step, place: str) -> dict[str, Any]:
    """Writes what there is so far for another program, into ``exports``; once finished it is not written again."""
    assert isinstance(step.settings, ExportSettings)
    name = _export_name(step)
    target = context.directory.out / EXPORTS / name

    def write() -> dict[str, Any]:
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = export_to(folder, target, **step.settings.model_dump())
        return {"file": f"{EXPORTS}/{name}"} | found

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
    if folder == context.source and not results["stages"]:
        copy_other_files(folder, directory.out)
    else:
        publish(folder, directory.out)
    exported = {Path(each["file"]).name for each in results["exports"]}
    directory.keep_exports(exported)
    results["peak_memory_bytes"] = peak_memory()
    write_json(directory.out / "results.json", results)
    write_card(directory.out, results)
    write_report(directory.out, results)
    source = hash_model(context.source, ".safetensors")
    directory.write_manifest(parent={"model": model, "files": source}, versions=versions(), seed=context.recipe.seed)
    context.tell("done", out=str(directory.out), again=False)


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
    return read_json(file)
