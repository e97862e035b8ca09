"""What a folder proves: which components of the framework are there, in which files, and under which licences; nothing is listed that does not exist.

A training from text (``duramen train``) proves nearly all of it by its stages. A compressed model proves its own step; what only the release of its base could supply (training code, data sets,
milestones) is not counted, and its weights keep the base's licence, which may not be laxer here (our reading).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duramen.assets import ASSETS, DEBIAN
from duramen.problem import Problem
from duramen.reading import read_json, reading
from duramen.recipe import DRAWN, NEW
from duramen.release.components import PAPER, REPORT, WEIGHTS
from duramen.release.licences import detect, parse, suggest
from duramen.rundir import visible_files
from duramen.train.exercises import EXERCISES

FOLDER = "release"
"""In the model's folder: what ``duramen release`` writes."""
USUAL = {"code": "Apache-2.0", "data": "CDLA-Permissive-2.0", "document": "CC-BY-4.0"}
"""Licences of what Duramen itself made of a training, where nothing else is said."""
TUNED = ("sft", "dpo", "grpo")
"""Stages that learn examples, of their own or made."""
OF_THE_WHOLE = ("Training code", "Datasets", "Data card", "Data preprocessing code", "Model parameters (Intermediate)")
"""What a training proves only if it began with nothing."""
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Wish:
    """What a releaser says beyond the files.

    Attributes:
        licences: By kind, in the place of the usual ones.
        base_licence: Of the model that was compressed, where its folder does not say it.
        report: File of the technical report, in the folder.
        paper: File of the research paper, in the folder; a very detailed report may be it.
        producer: Who releases it.
    """

    licences: Mapping[str, str] = field(default_factory=dict)
    base_licence: str = ""
    report: str = ""
    paper: str = ""
    producer: str = "unnamed"


@dataclass(frozen=True)
class Evidence:
    """Of one component.

    Attributes:
        files: That prove it, in the model's folder.
        says: What they are.
        licence: Its own; None to inherit that of its kind.
    """

    files: tuple[str, ...]
    says: str
    licence: str | None = None


@dataclass(frozen=True)
class Gathered:
    """All that a folder proves.

    Attributes:
        components: By name.
        results: Of the run, empty without.
        stages: Manifests of a training from text, in order.
        base: Name and licence of the model that was compressed; None for a new one.
        licences: By kind, of what is not licensed apart.
        architectures: That the model's configuration names.
    """

    components: dict[str, Evidence]
    results: dict[str, Any]
    stages: list[dict[str, Any]]
    base: tuple[str, str] | None
    licences: dict[str, str]
    architectures: tuple[str, ...]

    @property
    def of_images(self) -> bool:
        """Whether the model reads images."""
        return "images" in self.results


def licences_given(given: list[str]) -> dict[str, str]:
    """`KIND=SPDX` as a dictionary.

    Raises:
        Problem: If one reads otherwise.
    """
    found = dict(each.partition("=")[::2] for each in given)
    for kind, licence in found.items():
        if kind not in USUAL or not licence:
            raise Problem(
                f"`--licence {kind}={licence}` names no licence of a kind.",
                why="it reads KIND=SPDX.",
                fix="`--licence document=CC-BY-4.0`",
            )
    return found


def gather(folder: Path, wish: Wish) -> Gathered:
    """Looks a folder through.

    Args:
        folder: Of a model, with or without a run of Duramen.
        wish: What its files do not say.

    Raises:
        Problem: If there is no model, a file leads out of the folder, a named one is missing, or a licence is unknown or laxer than the base's.
    """
    if not (folder / "config.json").is_file():
        raise Problem(
            f"{folder} is no model.", why="it has no `config.json`.", fix="the OUT folder of `duramen train` or `duramen run`."
        )
    check_links(folder)
    results = _json(folder / "results.json")
    stages = [_json(file) | {"folder": file.parent.name} for file in sorted(folder.glob("stages/*/manifest.json"))]
    tuned = next((name for stage in stages if isinstance(name := stage["settings"].get("model"), str) and name), "")
    new = (bool(stages) or results.get("model") == NEW) and not tuned
    base = None if new else _base(folder, tuned, results, wish)
    licences = _licences(wish, base)
    architectures = tuple(read_json(folder / "config.json").get("architectures") or ())
    found = _model(folder, base, architectures) | (_trained(folder, stages) if stages else {})
    if tuned:  # how the model that it begins with came about is not in the folder
        found = {name: each for name, each in found.items() if name not in OF_THE_WHOLE}
    with reading(folder / "results.json"):
        found |= _measured(folder, results)
    if new and not stages:
        found["Training code"] = Evidence(
            _top(folder, "recipe.lock.yaml"), "all steps, with every setting, carried out by Duramen"
        )
    for name, given in ((REPORT, wish.report), (PAPER, wish.paper)):
        if given:
            if not (folder / given).is_file():
                raise Problem(
                    f"There is no file {folder / given}.",
                    why=f"it was named as the {name.lower()}.",
                    fix="put it into the model's folder.",
                )
            found[name] = Evidence((given,), "written by hand")
    return Gathered(found, results, stages, base, licences, architectures)


def check_links(folder: Path) -> None:
    """Stops at a link that leads out of the folder: what is released must be in it.

    Raises:
        Problem: Then.
    """
    root = folder.resolve()
    for file in sorted(folder.rglob("*")):
        if file.is_symlink() and not file.resolve().is_relative_to(root):
            raise Problem(
                f"{file} is a link to {file.resolve()}.", why="a release that leads out of its folder holds something else on every machine.",
                fix="put the file itself there.",
            )  # fmt: skip


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _base(folder: Path, tuned: str, results: Mapping[str, Any], wish: Wish) -> tuple[str, str]:
    """Name and licence of the model that this one was made from, or that it is; the folder of one that stages have ``tuned`` speaks for it."""
    name, place = tuned or str(results.get("model", folder.name)), Path(tuned) if tuned and Path(tuned).is_dir() else folder
    known = ASSETS.get(name)
    said = wish.base_licence or (known.licence.split(" (")[0] if known else "") or _card_licence(place)
    there = {
        each
        for file in sorted(place.glob("LICEN[CS]E*"))
        for each in detect(file.read_text(encoding="utf-8", errors="replace"))
    }
    if said and there and _either(said) not in map(_either, there):
        raise Problem(
            f"Two licences conflict: {said} is stated, and the text of {' and '.join(sorted(there))} is in the folder.", why="only one can hold.",
            fix="mend the card, the file or `--base-licence`.",
        )  # fmt: skip
    licence = said or " AND ".join(sorted(there))
    return name, plain(licence) if licence and not there else licence


def _either(licence: str) -> str:
    """Without what the text of a licence leaves open: whether later ones hold too."""
    return licence.removesuffix("-only").removesuffix("-or-later")


def _card_licence(folder: Path) -> str:
    """What the front matter of a model card says, as an SPDX id; empty if nothing."""
    card = folder / "README.md"
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    if not lines or lines[0] != "---":
        return ""
    said = next((line.partition(":")[2].strip() for line in lines[1:] if line.startswith("license:")), "")
    return suggest(said) or said


def _licences(wish: Wish, base: tuple[str, str] | None) -> dict[str, str]:
    """Licences by kind; those of data are the base's for a model that was made from one.

    Raises:
        Problem: If one is unknown, or the weights are given another licence than the base's.
    """
    for licence in wish.licences.values():
        parse(licence)
    if base is None:
        return USUAL | dict(wish.licences)
    asked = wish.licences.get("data")
    if asked and asked != base[1]:
        raise Problem(
            f"The weights cannot be put under {asked}.", why=f"they were made from {base[0]}, whose licence is {base[1] or 'not known'}.",
            fix="leave `data` out; `--base-licence` says what its folder does not.",
        )  # fmt: skip
    return {"code": USUAL["code"], "document": USUAL["document"], "data": base[1]} | {
        key: value for key, value in wish.licences.items() if key != "data"
    }


def _top(folder: Path, *patterns: str) -> tuple[str, ...]:
    """Files of the folder itself."""
    return tuple(sorted(file.name for pattern in patterns for file in folder.glob(pattern)))


def _model(folder: Path, base: tuple[str, str] | None, architectures: tuple[str, ...]) -> dict[str, Evidence]:
    """What every model's folder has."""
    found = {
        "Model architecture": Evidence(
            _top(folder, "config.json", "modeling_*.py"),
            f"{', '.join(architectures) or '?'} of transformers, with its configuration",
        ),
        "Inference code": Evidence((f"{FOLDER}/inference.py",), "opens the folder and runs it"),
        "Supporting libraries and tools": Evidence((f"{FOLDER}/sbom.cdx.json",), "what it was made with, as a CycloneDX bill"),
    }
    weights = _top(folder, *WEIGHT_FILES)
    if weights:
        found[WEIGHTS] = Evidence(weights, "safetensors", None if base is None else base[1] or "unlicensed")
    if (folder / "README.md").is_file():
        found["Model card"] = Evidence(("README.md",), "steps, figures and limits")
    return found


def _trained(folder: Path, stages: list[dict[str, Any]]) -> dict[str, Evidence]:
    """What the stages of a training prove."""
    kinds = {stage["method"] for stage in stages}
    places = {method: [f"stages/{stage['folder']}" for stage in stages if stage["method"] == method] for method in kinds}
    lock = ("recipe.lock.yaml", "recipe.yaml")
    found: dict[str, Evidence] = {}
    if "curate" in kinds:
        (place,) = places["curate"][:1]
        licences = _json(folder / place / "record.json").get("licences", {})
        found["Data preprocessing code"] = Evidence(
            lock, "the stages `curate` and `tokenize`, with every setting, carried out by Duramen"
        )
        files = tuple(name for name in visible_files(folder) if name.startswith(f"{place}/data/"))
        own = sorted(
            {
                stage["method"]
                for stage in stages
                if stage["settings"].get("data", EXERCISES) != EXERCISES and stage["method"] in TUNED
            }
        )
        terms = joined(licences.values()) if not own else "unlicensed"
        said = f"; what {' and '.join(own)} learned is not among them" if own else ""
        found["Datasets"] = Evidence(files, f"the documents that were learned and set apart{said}", terms)
        found["Data card"] = Evidence(
            (f"{FOLDER}/DATA_CARD.md", f"{FOLDER}/croissant.json"), "sources, terms and what was left out"
        )
    if "pretrain" in kinds:
        found["Training code"] = Evidence(lock, "all stages, with every setting, carried out by Duramen")
        last = {f"stages/{stage['folder']}": int(stage["settings"].get("steps", 0)) for stage in stages}
        kept = tuple(
            name
            for name in visible_files(folder)
            if (at := re.match(r"(stages/[^/]+)/checkpoints/step-(\d+)/", name)) and int(at[2]) < last.get(at[1], 0)
        )
        if kept:
            found["Model parameters (Intermediate)"] = Evidence(kept, "checkpoints on the way, with the optimizer's moments")
    manifests = tuple(f"stages/{stage['folder']}/manifest.json" for stage in stages)
    metrics = tuple(name for name in visible_files(folder) if name.endswith("metrics.jsonl"))
    found["Model metadata"] = Evidence((*manifests, *metrics), "what went into every stage and came out, and its course")
    return found


def joined(licences: Any) -> str:
    """The terms of a collection: all of its parts' hold."""
    parts = sorted({plain(licence) for licence in licences})
    return " AND ".join(f"({each})" if " OR " in each else each for each in parts) or "unlicensed"


def plain(licence: str) -> str:
    """An SPDX id of how a source states its licence, without what it says beyond it; ``LicenseRef`` for what is none."""
    embedded = licence in {asset.licence for asset in (ASSETS | DEBIAN).values()}  # whose words behind are a remark
    bare = licence.split(" (", maxsplit=1)[0].strip() if embedded else licence.strip()
    try:
        parse(bare)
    except Problem:
        near = suggest(bare)
        return near or f"LicenseRef-{''.join(letter if letter.isalnum() else '-' for letter in bare).strip('-') or 'unknown'}"
    return bare


def measured_on(results: Mapping[str, Any]) -> list[str]:
    """Names or files of the texts, tasks or images of a run's measurements."""
    if "images" in results:
        return [results["images"]["data"]]
    return sorted({*(name for each in results["evaluations"] for name in (*each["perplexity"], *each["tasks"]))})


def _measured(folder: Path, results: Mapping[str, Any]) -> dict[str, Evidence]:
    """What a run's measurements prove."""
    if not results.get("evaluations"):
        return {}
    names = measured_on(results)
    known = {name: asset.licence for name, asset in (ASSETS | DEBIAN).items()} | {DRAWN: USUAL["code"]}
    terms = joined(known[name] for name in names) if all(name in known for name in names) else "unlicensed"
    found = {
        "Evaluation code": Evidence(
            _top(folder, "recipe.lock.yaml"), "the steps that measure, with every setting, carried out by Duramen"
        ),
        "Evaluation results": Evidence(_top(folder, "results.json", "report.html"), "figures with intervals and counts"),
        "Evaluation data": Evidence((f"{FOLDER}/evaluation.json",), f"{', '.join(names)}: packages, files and hashes", terms),
    }
    if any(each.get("generations") for each in results["evaluations"]):
        found["Sample model outputs"] = Evidence((f"{FOLDER}/samples.md",), "greedy continuations")
    return found
