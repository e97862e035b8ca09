"""Many runs on one page: a table that can be filtered and sorted, and size against quality with the front of those that no other run beats in both.

``results.json`` of every run is all it reads. A run that cannot be understood is listed with what is wrong.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from duramen.problem import Problem
from duramen.reading import read_json, reading
from duramen.report.charts import scatter_chart
from duramen.report.page import render
from duramen.rundir import EXPORTS, STATE, write_text

RESULTS = "results.json"
SKIPPED = (STATE, "stages", EXPORTS, "release", ".git", ".venv")


@dataclass(frozen=True)
class Line:
    """One run on the page.

    Attributes:
        place: Its folder, as the page links it.
        name: Of its recipe, or what was varied.
        model: What it began with.
        steps: Its methods, in order.
        size: Of the weights that the steps touched, as a share of them dense at 16 bits; NaN if nothing says it.
        file: Bytes of what was exported, or of the folder's tensors; 0 if they were not measured.
        quality: Perplexity on the first text, or the share of images that is wrong; NaN if it was not measured.
        before: The same of the model that it began with.
        on: The text, or the images.
        kl: KL from the dense model on the text, nats; NaN if it was not measured.
        wrong: Why it has no figures, empty if it has.
        samples: What the model says to the prompts.
        report: Whether it has a page.
    """

    place: str
    name: str
    model: str = ""
    steps: str = ""
    size: float = math.nan
    file: int = 0
    quality: float = math.nan
    before: float = math.nan
    on: str = ""
    kl: float = math.nan
    wrong: str = ""
    samples: tuple[tuple[str, str], ...] = ()
    report: bool = True

    @property
    def words(self) -> str:
        """What a filter looks through."""
        return " ".join([self.name, self.model, self.steps, self.on, self.wrong]).lower()


def find_runs(root: Path) -> list[Path]:
    """The folders of finished runs below a folder, itself too, but for what runs keep inside; links are not followed."""
    found = []
    for folder, inside, files in os.walk(root):
        inside[:] = sorted(name for name in inside if name not in SKIPPED and not name.startswith("."))
        if RESULTS in files:
            found.append(Path(folder))
    return found


def summarise(folder: Path, place: str, name: str = "") -> Line:
    """A run in one line.

    Args:
        folder: Of the run.
        place: How the page links it.
        name: In the place of its recipe's.
    """
    report = (folder / "report.html").is_file()
    try:
        results = read_json(folder / RESULTS)
        with reading(folder / RESULTS):
            found = _images(results) if "images" in results else _texts(results)
            steps = ", ".join(str(step["method"]) for step in results["steps"])
            return Line(place, name or str(results["recipe"]), str(results["model"]), steps, report=report, **found)
    except Problem as problem:
        return Line(place, name or folder.name, wrong=problem.what, report=report)


def _texts(results: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"size": _size(results["steps"])}
    if results.get("exports"):
        found["file"] = int(results["exports"][-1]["bytes"])
    for evaluation in results["evaluations"][-1:]:
        found.setdefault("file", int(_last(evaluation["bytes_on_disk"], 0)))
        for text, told in list(evaluation["perplexity"].items())[:1]:
            found["before"] = float(told["before"]["value"]) if "before" in told else math.nan
            found["quality"] = float(_last(told)["value"])
            found |= {"on": str(text), "kl": float(told["kl"]["value"]) if "kl" in told else math.nan}
        said = evaluation.get("generations") or {}
        found["samples"] = tuple((str(prompt), str(_last(each, ""))) for prompt, each in said.items())
    return found


def _images(results: dict[str, Any]) -> dict[str, Any]:
    for evaluation in results["evaluations"][-1:]:
        told = evaluation["accuracy"]
        before = 1 - float(told["before"]["value"]) if "before" in told else math.nan
        return {"quality": 1 - float(_last(told)["value"]), "before": before, "on": str(results["images"]["data"])}
    return {}


def _last(told: dict[str, Any], otherwise: Any = None) -> Any:
    """What was measured after the steps, or before where nothing changed."""
    return told.get("after", told.get("before", otherwise))


def _size(steps: list[dict[str, Any]]) -> float:
    """Bits that are left of the layers that steps touched, of 16 for every weight that there was; what steps cut is counted by the shapes that they leave."""
    shapes = [step["shape"]["parameters"] for step in steps if step.get("shape")]
    share = shapes[-1]["after"] / shapes[0]["before"] if shapes else 1.0
    layers: dict[str, dict[str, float]] = {}
    for layer in (layer for step in steps if not step.get("shape") for layer in step["layers"]):
        mine = layers.setdefault(layer["layer"], {"size": layer["size"], "left": 1.0, "bits": 16.0})
        mine["left"] = 1 - layer["removed"] / max(1, layer["size"]) if layer.get("removed") else mine["left"]
        mine["bits"] = layer.get("bits", mine["bits"])
    if not layers:
        return share if shapes else math.nan
    whole = sum(each["size"] for each in layers.values())
    return share * sum(each["size"] * each["left"] * each["bits"] / 16 for each in layers.values()) / whole


def front(lines: Iterable[Line]) -> list[Line]:
    """The runs that no other one beats in both size and quality, from the smallest on."""
    best, found = math.inf, list[Line]()
    for line in sorted(lines, key=lambda each: (each.size, each.quality)):
        if line.quality < best:
            best, found = line.quality, [*found, line]
    return found


def overview(title: str, lines: list[Line], said: str = "") -> str:
    """The page.

    Args:
        title: Of the page.
        lines: The runs.
        said: A sentence above them.
    """
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if math.isfinite(line.quality) and math.isfinite(line.size):
            groups.setdefault((line.model, line.on), []).append(line)
    charts, best = [], set[str]()
    for (model, on), mine in groups.items():
        ahead = front(mine)
        if len(mine) > 1:
            best |= {line.place for line in ahead}
            places = [[(line.size, line.quality) for line in some] for some in (mine, ahead)]
            svg = scatter_chart(places[0], places[1], "size of what was touched, of 16 bits and dense", "perplexity")
            charts.append({"title": f"{model}, {on}", "svg": svg, "front": [line.name for line in ahead]})
    shown = [asdict(line) | {"words": line.words, "best": line.place in best} for line in lines]
    return render("overview.html.jinja", title=title, said=said, lines=shown, charts=charts, finite=math.isfinite)


def write_overview(file: Path, title: str, lines: list[Line], said: str = "") -> None:
    """The page as a file."""
    write_text(file, overview(title, lines, said))
