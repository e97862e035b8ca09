"""The model card of a result: README.md with the metadata that the hub reads, all of it taken from ``results.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from duramen.rundir import write_text

MASKED = (
    "Removed weights are stored as zeros in ordinary tensors: the file is not smaller for them, and no speed-up is claimed. "
    "`masks.safetensors` says which they are. "
)


def write_card(folder: Path, results: dict[str, Any]) -> Path:
    """Writes ``README.md`` beside the weights.

    Args:
        folder: The run directory.
        results: Content of ``results.json``.
    """
    file = folder / "README.md"
    write_text(file, f"---\n{yaml.safe_dump(_metadata(results), sort_keys=False)}---\n{_body(results)}")
    return file


def _metadata(results: dict[str, Any]) -> dict[str, Any]:
    stages = results.get("stages", [])
    tags = ["duramen", *(step["method"] for step in [*stages, *results["steps"]])]
    return {"library_name": "transformers"} | ({} if stages else {"base_model": results["model"]}) | {"tags": tags}


def _body(results: dict[str, Any]) -> str:
    shapes = [step["shape"] for step in results["steps"] if step.get("shape")]
    masked = any(layer["removed"] for step in results["steps"] if not step.get("shape") for layer in step["layers"])
    opens = shapes[-1]["opens_in"] if shapes else "plain transformers"
    stages = results.get("stages", [])
    name = results["recipe"] if stages else f"{results['model']}, {results['recipe']}"
    parts = [f"# {name}", f"Made with Duramen. Opens in {opens}."]
    parts += [_stage(stage) for stage in stages]
    parts += [_step(step) for step in results["steps"]]
    if results.get("exports"):
        parts.append(
            "## Exports\n\n"
            + "\n".join(
                f"- `{found['file']}`: {found['form']}, {found['coded']} layers with their codes"
                for found in results["exports"]
            )
        )
    if results["evaluations"]:
        parts.append(_measurements(results["evaluations"][-1]))
    parts += [
        "## Limits",
        (MASKED if masked else "") + "Quality was measured only on what the table names.",
        "## How to repeat it",
        f"```\n{results['command']}\n```",
        _licences(stages) if stages else "Licence and intended use are those of the base model.",
    ]
    return "\n\n".join(parts) + "\n"


def _stage(stage: dict[str, Any]) -> str:
    """A stage of training: what it saw and what it took."""
    found, said = stage["found"], f"{stage['seconds'] / 60:.1f} minutes."
    if "sources" in found and "parameters" in found:
        seen = ", ".join(f"{count:,} of {name}" for name, count in found["sources"].items())
        said = f"{found['parameters']:,} parameters; target tokens seen: {seen}. Held-out loss {found['held_out'][-1][1]:.3f}. {said}"
    return f"## {stage['id']}\n\n{said} Settings: {_settings(stage)}."


def _licences(stages: list[dict[str, Any]]) -> str:
    """Under which terms the text came."""
    found = {name: terms for stage in stages for name, terms in stage["found"].get("licences", {}).items()}
    return (
        "Licences of the text: " + ", ".join(f"{name} {terms}" for name, terms in found.items()) + "."
        if found
        else "See the data."
    )


def _step(step: dict[str, Any]) -> str:
    if step.get("reduction"):
        found = step["reduction"]
        words = f"Prompts get shorter inside the model: the mean layer sees {found['tokens']:.0%} of the tokens. The weights are those of the dense model, which is what plain transformers opens; `duramen.load` opens the one that was measured, by `reduction.json`."
        return f"## {step['method']}\n\n{words} Settings: {_settings(step)}."
    if step.get("shape"):
        before, after = (step["shape"]["parameters"][when] for when in ("before", "after"))
        sizes = f"{after:,} parameters instead of {before:,}; `pruning_plan.json` lists what stayed."
        return f"## {step['method']}\n\n{sizes} Settings: {_settings(step)}."
    rounded = [layer for layer in step["layers"] if "bits" in layer]
    said: list[str] = [step["said"]] if step.get("said") else []
    if rounded:
        bits = sum(layer["bits"] * layer["size"] for layer in rounded) / sum(layer["size"] for layer in rounded)
        said.append(
            f"The weights of {len(rounded)} layers are on a grid, {bits:.2f} bits each with their steps; `codes.safetensors` has the codes, `formats.json` the grids, and the ordinary tensors what they stand for."
        )
    if step.get("rounds"):
        counts = ", ".join(f"{count} modules by `{text}`" for text, count in step["rounds"].items())
        said.append(
            f"The model rounds as it runs: {counts} (`formats.json`). Plain transformers does not; `duramen.load` opens what was measured."
        )
    if said:
        return f"## {step['method']}\n\n{' '.join(said)} Settings: {_settings(step)}."
    removed = sum(layer["removed"] for layer in step["layers"])
    size = sum(layer["size"] for layer in step["layers"])
    return f"## {step['method']}\n\n{removed:,} of {size:,} weights removed in {len(step['layers'])} layers. Settings: {_settings(step)}."


def _settings(step: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in step["settings"].items() if key not in ("id", "method"))


def _measurements(evaluation: dict[str, Any]) -> str:
    lines = ["## Measured", "| | before | after |", "|---|---|---|"]
    for text, found in evaluation["perplexity"].items():
        label = f"perplexity, {text}, {found['windows']} windows of {found['length']} tokens"
        lines.append(f"| {label} | {_figure(found.get('before'))} | {_figure(found.get('after'))} |")
    for task, found in evaluation["tasks"].items():
        cells = [_figure(found[name]["acc"]) if name in found else "" for name in ("before", "after")]
        lines.append(f"| {task}, accuracy, {found['documents']} documents | {cells[0]} | {cells[1]} |")
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def _figure(measured: dict[str, float] | None) -> str:
    return f"{measured['value']:.3g} ({measured['low']:.3g} to {measured['high']:.3g})" if measured else ""
