"""``duramen release``: gathers what a folder proves, computes its class, and writes all that earns it into ``release`` in the folder; ``duramen verify`` does it again and compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from duramen.problem import Exit, Problem
from duramen.reading import read_json, reading
from duramen.release import cards, provenance
from duramen.release.components import COMPONENTS, FRAMEWORK
from duramen.release.evidence import FOLDER, Gathered, Wish, check_links, gather
from duramen.release.openness import PROFILES, Profile, Verdict, advise, evaluate
from duramen.release.page import write_page
from duramen.rundir import hash_file, unlike, visible_files, write_json, write_text

FILE, VERDICT, WISH = "mof.yml", "verdict.json", "wish.json"


def release(folder: Path, wish: Wish, *, profile: Any = "fixed", required: int = 0) -> dict[str, Any]:
    """Writes the release of a model.

    Args:
        folder: Of the model.
        wish: What its files do not say.
        profile: Of the rules by which the class counts; the others' verdicts are said too.
        required: Class that is wanted (1 is the most open); 0 for any.

    Returns:
        The verdict: class, progress, status and files of every component, what is missing, warnings.

    Raises:
        Problem: If the folder is no model, a profile or licence is unknown, or the class is not reached; what is missing is named.
    """
    if profile not in PROFILES:
        raise Problem(f"There is no profile `{profile}`.", why=f"they are {', '.join(PROFILES)}.", fix="`--profile fixed`")
    gathered = gather(folder, wish)
    name = str(gathered.results.get("recipe") or folder.resolve().name)
    place = folder / FOLDER
    with reading(folder / "results.json"):
        _write_parts(folder, place, gathered, name, wish)
    framework = framework_file(gathered, name, wish)
    found = verdict(framework["release"], profile) | {
        "name": name, "components": [_told(each, gathered) for each in COMPONENTS], "licences": gathered.licences,
    }  # fmt: skip
    write_text(place / FILE, dump(framework))
    write_json(place / WISH, vars(wish) | {"profile": profile})
    write_json(place / VERDICT, found)
    write_page(place / "index.html", found)
    write_text(place / provenance.SUMS, provenance.check_sums(folder))
    if required and not 1 <= found["class"] <= required:
        missing = "\n    ".join(found["missing"][str(required)])
        raise Problem(
            f"{name} is {found['label']}, and class {'I' * required} is required. It lacks:\n    {missing}", why=f"these are the framework's rules ({profile}).",
            fix="add what is named, and run the same line again.", code=Exit.CHECK_FAILED,
        )  # fmt: skip
    return found


def _write_parts(folder: Path, place: Path, gathered: Gathered, name: str, wish: Wish) -> None:
    """Writes what components consist of and no run has written yet."""
    weights = {file: hash_file(folder / file) for file in gathered.components.get("Model parameters (Final)", Nothing).files}
    write_text(place / "inference.py", cards.inference_code(folder, gathered))
    write_text(place / "CITATION.cff", cards.citation(name, wish.producer, gathered.licences["data"]))
    write_json(place / "sbom.cdx.json", provenance.bill(gathered, name, weights))
    if "Evaluation data" in gathered.components:
        write_json(place / "evaluation.json", provenance.evaluation_data(gathered))
    if "Sample model outputs" in gathered.components:
        write_text(place / "samples.md", cards.samples(gathered))
    if "Data card" in gathered.components:
        files = gathered.components["Datasets"].files
        hashes = {file: hash_file(folder / file) for file in files}
        write_text(place / "DATA_CARD.md", cards.data_card(gathered, name))
        write_json(
            place / "croissant.json",
            provenance.croissant(gathered, name, hashes, {file: (folder / file).stat().st_size for file in files}),
        )


class Nothing:
    """Stands for evidence that is not there."""

    files: tuple[str, ...] = ()


def framework_file(gathered: Gathered, name: str, wish: Wish) -> dict[str, Any]:
    """The framework's own file on a release; see the schema in the public evaluator's repository.

    Args:
        gathered: What the folder proves.
        name: Of the model.
        wish: Says the producer.
    """
    components: list[dict[str, Any]] = [
        {
            "name": component.name, "description": gathered.components[component.name].says,
            "component_path": ", ".join(gathered.components[component.name].files[:8]),
        }
        | ({} if gathered.components[component.name].licence is None else {"license": gathered.components[component.name].licence})
        for component in COMPONENTS
        if component.name in gathered.components
    ]  # fmt: skip
    said = {"distribution": ""} | gathered.licences
    licences = {kind: {"name": each or None, "path": None} for kind, each in said.items()}
    tuned = any(stage["method"] in ("sft", "dpo", "grpo") for stage in gathered.stages)
    treatment = {"treatment": "chat fine-tuned" if tuned else "pre-trained"} if gathered.stages else {}
    return {
        "framework": FRAMEWORK,
        "release": {
            "name": name, "producer": wish.producer, **_kind(gathered), **treatment,
            "license": licences, "components": components,
        },
    }  # fmt: skip


def _kind(gathered: Gathered) -> dict[str, str]:
    """What the model reads and how it is built, in the framework's words; it has none for state spaces."""
    if gathered.of_images:
        return {"type": "vision", "architecture": "encoder"}
    states = any("Mamba" in name for name in gathered.architectures)
    return {"type": "language", "architecture": "other" if states else "transformer decoder"}


def dump(value: dict[str, Any]) -> str:
    """As YAML; dates stay strings."""
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110))


def verdict(found: dict[str, Any], profile: Profile) -> dict[str, Any]:
    """The class by one profile, what is missing for each, and what the other profiles say."""
    all_of_them: dict[str, Verdict] = {each: evaluate(found, each) for each in PROFILES}
    mine = all_of_them[profile]
    further = next((level for level in (3, 2, 1) if mine.level == 0 or level < mine.level), None)
    return {
        "profile": profile, "class": mine.level, "next": further, "label": mine.label, "progress": {str(level): round(each, 2) for level, each in mine.progress.items()},
        "badges": {str(level): mine.badge(level) for level in (3, 2, 1)}, "statuses": mine.statuses, "warnings": mine.warnings,
        "missing": {str(level): advise(found, level, profile) for level in (3, 2, 1)},
        "profiles": {each: {"class": other.level, "label": other.label} for each, other in all_of_them.items()},
    }  # fmt: skip


def _told(component: Any, gathered: Gathered) -> dict[str, Any]:
    """A component for people and machines: its kind, its files, its licence."""
    evidence = gathered.components.get(component.name)
    kind = gathered.licences[component.kind]
    return {
        "name": component.name, "kind": component.kind, "class": component.level, "required": component.required, "holds": component.holds,
        "says": evidence.says if evidence else "", "files": list(evidence.files) if evidence else [],
        "licence": (evidence.licence if evidence.licence is not None else kind) if evidence else None,
    }  # fmt: skip


def verify(folder: Path) -> list[str]:
    """What a release claims and its folder does not hold; empty if all is as it was.

    Every hash is taken again, files that appeared are named, and the class is derived anew from the files.

    Args:
        folder: Of the model, with its ``release``.

    Raises:
        Problem: If there is no release, or a link leads out of the folder.
    """
    place = folder / FOLDER
    if not (place / provenance.SUMS).is_file():
        raise Problem(
            f"{folder} has no release.", why=f"there is no {FOLDER}/{provenance.SUMS}.", fix=f"`duramen release {folder}`"
        )
    check_links(folder)
    lines = [line.partition("  ") for line in (place / provenance.SUMS).read_text(encoding="utf-8").splitlines()]
    claimed = {name: digest for digest, _, name in lines if name}
    there = visible_files(folder)
    wrong = [f"{name} {state}" for name, state in unlike(folder, claimed).items()]
    wrong += [f"{name} is not listed" for name in there if name not in claimed and name != f"{FOLDER}/{provenance.SUMS}"]
    with reading(place / VERDICT):
        return wrong or _rederived(folder)


def _made(folder: Path) -> dict[str, str]:
    """Hashes that the run wrote down of its files."""
    file = folder / "manifest.json"
    return dict(read_json(file).get("files", {})) if file.is_file() else {}


def _rederived(folder: Path) -> list[str]:
    """Differences between the verdict that is written down and the one that follows from the files."""
    place = folder / FOLDER
    said = read_json(place / WISH)
    profile = said.pop("profile")
    wish = Wish(**said)
    gathered = gather(folder, wish)
    kept = read_json(place / VERDICT)
    framework = framework_file(gathered, kept["name"], wish)
    found = verdict(framework["release"], profile)
    made = _made(folder) | {
        f"stages/{stage['folder']}/{name}": digest for stage in gathered.stages for name, digest in stage["outputs"].items()
    }
    wrong = [f"{name} is not what was made: it {state}" for name, state in unlike(folder, made).items()]
    if (place / FILE).read_text(encoding="utf-8") != dump(framework):
        wrong.append(f"{FILE} does not say what the files prove")
    return wrong + [
        f"the verdict's {key} is {kept[key]}, and the files give {value}" for key, value in found.items() if kept[key] != value
    ]
