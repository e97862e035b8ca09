"""The report and the card of a run on images: accuracy against speed, and the images with what has left them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from duramen.report.charts import line_chart, photograph
from duramen.report.network import export_words, network_section, search_words
from duramen.report.page import render
from duramen.rundir import write_text


def write_image_report(folder: Path, results: dict[str, Any]) -> Path:
    """Writes ``report.html``.

    Args:
        folder: The run directory.
        results: Content of ``results.json``.
    """
    measured = results["evaluations"][-1] if results["evaluations"] else None
    page = render(
        "images.html.jinja",
        results=results,
        verdict=image_verdict(results),
        rows=_rows(results, measured) if measured else [],
        tried=[row for step in results["steps"] if len(step.get("tried", [])) > 1 for row in _tried(step)],
        exports=export_words(results["exports"]),
        networks=[network_section(step["search"]) for step in results["steps"] if "search" in step],
        trained=[_trained(step["id"], each) for step in results["steps"] for each in step.get("trainings", [])],
        shown=[_shown(each, _sites(results)) for each in measured["shown"]] if measured else [],
        sites=_sites(results),
    )
    file = folder / "report.html"
    write_text(file, page)
    return file


def write_image_card(folder: Path, results: dict[str, Any]) -> Path:
    """Writes ``README.md`` beside the weights, with what the hub reads."""
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["duramen", *(step["method"] for step in results["steps"])],
    }
    parts = [
        f"# {results['model']}, {results['recipe']}",
        image_verdict(results),
        "Opens by `AutoModelForImageClassification` once `duramen.vision` is imported; which patches leave is part of the config.",
        f"## How to repeat it\n\n```\n{results['command']}\n```",
    ]
    file = folder / "README.md"
    write_text(file, f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n" + "\n\n".join(parts) + "\n")
    return file


def image_verdict(results: dict[str, Any]) -> str:
    """What happened, in a few sentences, with intervals."""
    parts = []
    pruned = [step for step in results["steps"] if "reduction" in step]
    if pruned:
        macs = pruned[-1]["macs"]
        parts.append(f"{1 - macs['reduced'] / macs['dense']:.0%} of the multiply-adds of an image are gone.")
    parts += [search_words(step["search"]) for step in results["steps"] if "search" in step]
    if results["evaluations"]:
        found = results["evaluations"][-1]
        parts.append(f"{_percent(found['accuracy']['after'])} of {found['images']:,} test images are told right.")
        if "change" in found:
            change = found["change"]
            none = change["low"] <= 0 <= change["high"]
            points = "{:+.1f} points ({:+.1f} to {:+.1f})".format(*(100 * change[key] for key in ("value", "low", "high")))
            parts.append(f"That is {points} from the dense model{': no measurable change' if none else ''}.")
            before, after = (found["speed"][name][-1] for name in ("before", "after"))
            apart = after["low"] > before["high"] or after["high"] < before["low"]
            parts.append(
                f"{after['batch']} at once are {after['median'] / before['median']:.2f} times as fast."
                if apart
                else f"{after['batch']} at once are no faster that could be measured."
            )
    if results.get("skipped"):
        parts.append(f"{len(results['skipped'])} image files could not be read and were left out; results.json names them.")
    return " ".join(parts) or "Nothing was measured."


def _percent(found: dict[str, float]) -> str:
    return f"{found['value']:.1%} ({found['low']:.1%} to {found['high']:.1%})"


def _rows(results: dict[str, Any], measured: dict[str, Any]) -> list[dict[str, str]]:
    """A row for the accuracy, the multiply-adds and each speed."""
    names = [name for name in ("before", "after") if name in measured["accuracy"]]
    rows = [
        {"what": "accuracy", "on": f"{measured['images']:,} images"}
        | {name: _percent(measured["accuracy"][name]) for name in names}
    ]
    pruned = [step["macs"] for step in results["steps"] if "reduction" in step]
    if pruned:
        rows.append(
            {
                "what": "multiply-adds, millions",
                "on": "an image",
                "before": f"{pruned[-1]['dense'] / 1e6:,.1f}",
                "after": f"{pruned[-1]['reduced'] / 1e6:,.1f}",
            }
        )
    for number, speed in enumerate(measured["speed"]["after"]):
        spread = {name: "{median:,.0f} ({low:,.0f} to {high:,.0f})".format(**measured["speed"][name][number]) for name in names}
        rows.append({"what": "images per second", "on": f"{speed['batch']} at once"} | spread)
    return [{"before": "", "after": ""} | row for row in rows]


def _tried(step: dict[str, Any]) -> list[dict[str, Any]]:
    """What was tried on held-out images, the best first."""
    return [
        {
            "sites": ", ".join(map(str, each["reduction"]["sites"])), "score": each["reduction"]["score"], "gap": each["reduction"]["gap_step"],
            "loss": f"{each['loss']:.3f}", "chosen": each["reduction"] == step["reduction"],
        }
        for each in sorted(step["tried"], key=lambda each: each["loss"])
    ]  # fmt: skip


def _sites(results: dict[str, Any]) -> list[int]:
    pruned = [step["reduction"]["sites"] for step in results["steps"] if "reduction" in step]
    return list(pruned[-1]) if pruned else []


def _shown(found: dict[str, Any], sites: list[int]) -> dict[str, Any]:
    """One image, whole and after every site."""
    side = round(len(found["left_after"]) ** 0.5)
    words = f"{found['class']}, told as {found['answer']}"
    cells = [photograph(found["pixels"], words)]
    for site in sites:
        stays = [after is None or after > site for after in found["left_after"]]
        there = [stays[row * side : (row + 1) * side] for row in range(side)]
        cells.append(photograph(found["pixels"], f"{words}; {sum(stays)} of {side**2} patches after layer {site}", there=there))
    return {"words": words, "right": found["class"] == found["answer"], "cells": cells}


def _trained(step: str, found: dict[str, Any]) -> dict[str, Any]:
    steps = [done for done, _ in found["held_out"]]
    curves = {
        "Held-out loss": [loss for _, loss in found["held_out"]],
        "Share told wrong": [terms["wrong"] for terms in found["terms"]],
    }
    return {
        "name": f"{step}, {found['name']}" if found["name"] else step,
        "words": f"{found['trained_parameters']:,} parameters in {len(found['losses'])} steps at a learning rate of {found['learning_rate']:.2g}; "
        f"{'classes and the dense model' if found['distilled'] else 'classes'} learned. Kept is the model after {found['best']} steps.",
        "charts": [{"name": name, "svg": line_chart(list(zip(steps, values, strict=True)), "steps", name.lower())} for name, values in curves.items()],
    }  # fmt: skip
