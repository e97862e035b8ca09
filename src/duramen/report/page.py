"""``report.html``: one self-contained page, legible on a phone, in print, in light and dark; no script.

``results.json`` is all it reads. The verdict and the changes are worded here, the page itself is ``page.html.jinja``.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from duramen.report.charts import heat_map, line_chart, range_chart, width_chart
from duramen.report.stages import stage_sections
from duramen.rundir import write_text

Row = dict[str, str]


def write_report(folder: Path, results: dict[str, Any]) -> Path:
    """Writes ``report.html``.

    Args:
        folder: The run directory.
        results: Content of ``results.json``.
    """
    evaluation = results["evaluations"][-1] if results["evaluations"] else None
    page = render(
        "page.html.jinja",
        results=results,
        title=results["recipe"] if results.get("stages") else f"{results['model']}: {results['recipe']}",
        stages=stage_sections(results.get("stages", [])),
        verdict=verdict(results),
        rows=measured_rows(evaluation) if evaluation else [],
        steps=[_step(step) for step in results["steps"]],
        latency=latency_charts(evaluation["latency"]) if evaluation else [],
        exports=[row for found in results.get("exports", []) for row in _exported(found)],
        generations=evaluation["generations"] if evaluation else {},
    )
    file = folder / "report.html"
    write_text(file, page)
    return file


def render(template: str, **values: Any) -> str:
    """A page from a template of this package; what it names must be there."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("duramen.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def verdict(results: dict[str, Any]) -> str:
    """What happened, in one or two sentences, with the interval."""
    steps = [step for step in results["steps"] if not step.get("shape")]
    layers = list({layer["layer"]: layer for step in steps for layer in step["layers"]}.values())
    shapes = [step["shape"] for step in results["steps"] if step.get("shape")]
    removed, size = sum(layer["removed"] for layer in layers), sum(layer["size"] for layer in layers)
    gone = f"{removed / max(size, 1):.1%} of the {size / 1e6:,.1f} million weights in {len(layers)} layers are gone"
    rounded = [layer for layer in layers if "bits" in layer]
    parts = [gone] if removed else []
    if results.get("stages"):
        pretrained = [stage["found"] for stage in results["stages"] if "parameters" in stage["found"]]
        seen = sum(sum(found["sources"].values()) for found in pretrained)
        size = f"{pretrained[-1]['parameters'] / 1e6:,.1f} million parameters" if pretrained else "a model"
        parts.append(
            f"{size}, trained on {seen / 1e6:,.2f} million tokens in {sum(stage['seconds'] for stage in results['stages']) / 60:,.0f} minutes"
        )
    if rounded:
        bits = sum(layer["bits"] * layer["size"] for layer in rounded) / sum(layer["size"] for layer in rounded)
        parts.append(f"the weights of {len(rounded)} layers are {bits:.2f} bits each")
    elif layers and not removed:
        parts.append(f"{len(layers)} layers were fitted anew")
    rounds: dict[str, int] = next((step["rounds"] for step in reversed(results["steps"]) if step.get("rounds")), {})
    if rounds:
        parts.append(f"as it runs the model rounds by {' and '.join(rounds)}")
    if shapes:
        before, after = shapes[0]["parameters"]["before"], shapes[-1]["parameters"]["after"]
        parts.append(
            f"the model has {after / 1e6:,.1f} million parameters instead of {before / 1e6:,.1f} ({after / before - 1:+.1%})"
        )
    reductions = [step["reduction"] for step in results["steps"] if step.get("reduction")]
    parts += [f"{1 - found['tokens']:.0%} fewer tokens of a prompt reach the mean layer" for found in reductions]
    for evaluation in results["evaluations"][-1:]:
        for text, found in evaluation["perplexity"].items():
            parts.append(_perplexity_verdict(text, found))
    words = "; ".join(parts) or "nothing was changed or measured"
    return words[0].upper() + words[1:] + "."


def _perplexity_verdict(text: str, found: dict[str, Any]) -> str:
    if "ratio" not in found:
        (name,) = {"before", "after"} & set(found)
        return f"perplexity on {text} is {found[name]['value']:.2f}"
    ratio = found["ratio"]
    change = f"×{ratio['value']:.2f}, 95 % interval {ratio['low']:.2f} to {ratio['high']:.2f}"
    return f"perplexity on {text} went from {found['before']['value']:.2f} to {found['after']['value']:.2f} ({change})"


def measured_rows(evaluation: dict[str, Any]) -> list[Row]:
    """The before/after table: what, before, after, change, and on how much."""
    rows: list[Row] = []
    for text, found in evaluation["perplexity"].items():
        basis = f"{found['windows']} windows of {found['length']} tokens, stride {found['stride']}"
        if found.get("context"):
            basis += f", after {found['context']} that are only read"
        ratio = f"× {_interval(found['ratio'])}" if "ratio" in found else ""
        rows.append(_row(f"Perplexity, {text}", found, ratio, basis))
        for key, label in (("kl", "KL from dense, nats"), ("agreement", "Same top-1 token as dense")):
            if key in found:
                after = {"after": found[key]}
                rows.append(_row(f"{label}, {text}", after, "", basis))
    for task, found in evaluation["tasks"].items():
        change = _difference(found["difference"]) if "difference" in found else ""
        accuracies = {name: found[name]["acc"] for name in ("before", "after") if name in found}
        rows.append(_row(f"Accuracy, {task}", accuracies, change, f"{found['documents']} documents"))
    for key, label in (("bytes_on_disk", "Weights on disk"), ("bytes_in_memory", "Weights in memory")):
        sizes = evaluation.get(key) or {}
        cells = {name: f"{value / 2**20:,.0f} MiB" for name, value in sizes.items()}
        rows.append(
            {"what": label, "before": cells.get("before", ""), "after": cells.get("after", ""), "change": "", "basis": ""}
        )
    return rows


def _row(what: str, found: dict[str, Any], change: str, basis: str) -> Row:
    cells = {name: _interval(found[name]) if name in found else "" for name in ("before", "after")}
    return {"what": what, **cells, "change": change, "basis": basis}


def _interval(measured: dict[str, float]) -> str:
    return f"{measured['value']:.3g} ({measured['low']:.3g} to {measured['high']:.3g})"


def _difference(measured: dict[str, float]) -> str:
    if measured["low"] <= 0 <= measured["high"]:
        return "no measurable change"
    return f"{measured['value']:+.3f} ({measured['low']:+.3f} to {measured['high']:+.3f})"


def _step(step: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of one step: totals per role, and the error of every layer as a map of blocks by roles."""
    if step.get("reduction"):
        return _reduction(step)
    layers = step["layers"]
    roles = list(dict.fromkeys(layer["role"] for layer in layers))
    errors: dict[int, dict[str, float]] = defaultdict(dict)
    for layer in layers:
        errors[layer["block"]][layer["role"]] = layer["relative_error"]
    positive = [layer["relative_error"] for layer in layers if layer["relative_error"] > 0] or [1.0]
    low, high = math.log(min(positive)), math.log(max(positive))

    def shade(value: float | None) -> int:
        """0 to 100, on a logarithmic scale."""
        return round(100 * (math.log(value) - low) / max(high - low, 1e-9)) if value and value > 0 else 0

    return {
        "method": step["method"],
        "reduction": None,
        "settings": _settings(step),
        "reopened": step["reopened"],
        "roles": [_role_totals(role, [layer for layer in layers if layer["role"] == role]) for role in roles],
        "names": roles,
        "map": [
            (block, [(errors[block].get(role), shade(errors[block].get(role))) for role in roles]) for block in sorted(errors)
        ],
        "shape": _shape(step["shape"]) if step.get("shape") else None,
        "fitted": bool(step.get("training")) or any("error_before" in layer for layer in layers),
        "from_dense": any("error_before" in layer for layer in layers),
        "training": _training(step["training"]) if step.get("training") else None,
        "treated": len(layers),
        "rounded": any("bits" in layer for layer in layers),
        "rounds": step.get("rounds"),
        "said": step.get("said"),
        "removed": any(layer["removed"] for layer in layers) and not step.get("shape"),
        "skipped": step["skipped"],
        "copied": step["copied_unchanged"],
    }


def _settings(step: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in step["settings"].items() if key not in ("id", "method")}


def _reduction(step: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a step that shortens prompts: what it saves in which layer, what was tried, and a text with what leaves."""
    found, layers = step["reduction"], len(step["reduction"]["costs"]["dense"])
    kind = {"tokens": "tokens", "macs": "multiply-adds", "seconds": "seconds"}[found["cut_of"]]
    shares = [after / before for before, after in zip(found["costs"]["dense"], found["costs"]["reduced"], strict=True)]
    sample = found["sample"]
    tried = [
        {
            "sites": ", ".join(map(str, each["reduction"]["sites"])), "gap_step": each["reduction"]["gap_step"],
            "aligned": "yes" if each["reduction"]["aligned"] else "no", "loss": f"{each['loss']:.4f}",
            "chosen": each["reduction"] == found["reduction"],
        }
        for each in found["tried"]
    ]  # fmt: skip
    words = f"The mean layer sees {found['tokens']:.1%} of the tokens of a prompt. Predicted, a prompt of {found['length']:,} tokens takes {found['saved']:.1%} fewer {kind}; speed, where it was measured, is above."
    return {
        "method": step["method"], "settings": _settings(step), "reopened": step["reopened"], "training": None, "shape": None,
        "rounded": False, "removed": False,
        "reduction": {
            "words": words, "kind": kind, "tried": tried if len(tried) > 1 else [],
            "chart": line_chart(list(enumerate(shares)), "layer", f"share of the {kind}"),
            "pieces": [
                (piece, None if after is None else round(100 * (after + 1) / layers))
                for piece, after in zip(sample["pieces"], sample["left_after"], strict=True)
            ],
        },
    }  # fmt: skip


def _training(found: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a step that trained."""
    (_, before), *_ = found["held_out"]
    after = min(loss for _, loss in found["held_out"])
    return {
        "words": f"{found['trained_parameters']:,} parameters in {found['layers']} layers, which have {found['covered']:.0%} of the blocks' parameters, "
        f"in {len(found['losses'])} steps at a learning rate of {found['learning_rate']:.2g}; {'text and the dense model' if found['distilled'] else 'text'} learned. "
        f"Held-out loss {before:.4f} before, {after:.4f} after {found['best']} steps, which were merged.",
        "thin": found["thin"], "charts": _curves(found), "maps": _attention_maps(found.get("maps", {})),
    }  # fmt: skip


def _attention_maps(found: dict[str, list[list[list[float]]]]) -> list[dict[str, Any]]:
    """Rows of pictures, one row for every layer that is shown: of the dense model, before training and after."""
    names = ("First layer", "Middle layer", "Last layer")
    return [
        {
            "name": name,
            "cells": [{"name": when, "img": heat_map(maps[number], f"{name}, {when}")} for when, maps in found.items()],
        }
        for number, name in enumerate(names[: len(found.get("dense", []))])
    ]


def _exported(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of what was written for other programs, one for each that ran it, and a sentence on where the two part."""
    return [_exported_to(found, engine, ran) for engine, ran in found["ran"].items()] or [
        _exported_to(found, found["engine"], None)
    ]


def _exported_to(found: dict[str, Any], name: str, ran: dict[str, Any] | None) -> dict[str, Any]:
    row = {
        "name": name,
        "file": found["file"],
        "size": f"{found['bytes'] / 2**20:,.1f}",
        "coded": found["coded"],
    }
    if not ran:
        opened = found.get("largest_difference")
        words = (
            ""
            if opened is None
            else f"{row['name']}: opened by plain transformers, its logits differ by at most {opened:.2g} (largest {found['largest_logit']:.3g})."
        )
        return row | dict.fromkeys(("alike", "prefill", "decode", "memory"), "") | {"words": words}
    if "failed" in ran:
        return (
            row
            | dict.fromkeys(("alike", "prefill", "decode", "memory"), "")
            | {"words": f"{name} did not run it: {ran['failed']}"}
        )
    speed = {
        key: "{median:,.0f} ({low:,.0f} to {high:,.0f})".format(**ran[f"{key}_tokens_per_second"])
        for key in ("prefill", "decode")
    }
    gaps = [each["gap"] for each in ran["apart"]]
    words = (
        f"{row['name']}: where the others part, transformers holds its own token likelier by at most {max(gaps):.2g} in logits."
        if gaps
        else ""
    )
    return (
        row
        | speed
        | {
            "alike": f"{ran['agreed']} of {ran['prompts']}",
            "memory": f"{ran['peak_memory_bytes'] / 2**20:,.0f}",
            "words": words,
        }
    )


def _curves(found: dict[str, Any]) -> list[dict[str, str]]:
    """The held-out loss over the steps, and every term of it."""
    steps = [done for done, _ in found["held_out"]]
    curves = {"Held-out loss": [loss for _, loss in found["held_out"]]}
    curves |= {
        f"Its {name}": [terms[name] for terms in found["terms"]] for name in found["terms"][0] if len(found["terms"][0]) > 1
    }
    return [
        {"name": name, "svg": line_chart(list(zip(steps, values, strict=True)), "steps", name.lower())}
        for name, values in curves.items()
    ]


def _shape(shape: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a step that changed shapes: sizes, the coupled groups, and the kept widths of every block."""
    kinds = [
        {
            "name": KINDS[kind], "units": found["units"], "least": min(found["kept"]), "most": max(found["kept"]),
            "members": found["members"], "chart": width_chart(shape["blocks"], found["kept"], found["units"]),
        }
        for kind, found in shape["kinds"].items()
    ]  # fmt: skip
    sizes = [
        (label, *(f"{shape[key][when] / 1e6:,.1f} million" for when in ("before", "after")), f"{shape[key]['after'] / shape[key]['before'] - 1:+.1%}")
        for label, key in (("Parameters", "parameters"), ("Multiply-adds per token", "macs_per_token"))
    ]  # fmt: skip
    skipped = [f"{' and '.join(parts)} of block {block}" for block, parts in shape["skipped"].items()]
    dropped = [f"block {block}" for block in shape["dropped"]]
    search = _search(shape["made_by"]) if "lineage" in shape["made_by"] else None
    return {"sizes": sizes, "kinds": kinds, "left_out": dropped + skipped, "opens_in": shape["opens_in"], "search": search}


def _search(made_by: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a search: its limits, how the best candidate got better, and the front."""
    names = {"uniform": "the same share everywhere", "knapsack": "the best sum of what modules lose alone"}
    limits = [
        f"{cost['winner']:,.0f} {resource.replace('_', ' ')} of at most {cost['most']:,.0f} (dense {cost['dense']:,.0f})"
        for resource, cost in made_by["costs"].items()
    ]
    if made_by.get("prefill"):
        dense, winner = (made_by["prefill"][name] for name in ("dense", "winner"))
        limits.append(f"measured afterwards, a prefill takes {winner:,.0f} ms and {dense:,.0f} ms by the dense model")
    if made_by.get("narrowed"):
        limits.append(made_by["narrowed"])
    measure, front = made_by.get("measure", "KL"), made_by.get("front", [])
    found = {
        "limits": limits, "measure": measure, "tokens": f"{made_by['tokens']:,}", "best": f"{made_by['lineage'][-1]:.3f}",
        "starts": [(names[name], f"{kl:.3f}") for name, kl in made_by.get("starts", {}).items()],
        "lineage": line_chart(list(enumerate(made_by["lineage"])), "generation", measure), "front": [],
    }  # fmt: skip
    if front:
        resource = next(iter(made_by["costs"])).replace("_", " ")
        chart = line_chart([(point["share"], point["kl"]) for point in front], f"share of {resource}", "KL")
        points = [(f"{point['share']:.3f}", f"{point['kl']:.3f}") for point in front]
        found |= {"front": points, "resource": resource, "chart": chart}
    return found


KINDS = {"ffn_channel": "FFN channels", "kv_group": "KV groups", "query_head": "query heads"}


def _role_totals(role: str, layers: list[dict[str, Any]]) -> dict[str, Any]:
    removed, size = sum(layer["removed"] for layer in layers), sum(layer["size"] for layer in layers)
    return {
        "role": role, "layers": len(layers), "removed": removed, "share": removed / size,
        "error": sum(layer["relative_error"] for layer in layers) / len(layers),
        "bits": sum(layer.get("bits", 0) * layer["size"] for layer in layers) / size,
    }  # fmt: skip


def latency_charts(latency: dict[str, Any]) -> list[dict[str, str]]:
    """One chart per measured figure, with the word for the change."""
    charts = []
    for key, label in (
        ("prefill_seconds", "Prefill of 256 tokens, seconds"),
        ("decode_tokens_per_second", "Decoding, tokens per second"),
    ):
        found: dict[str, Any] = {name: latency[name][key] for name in ("before", "after") if name in latency}
        if found:
            charts.append({"label": label, "svg": range_chart(found), "word": _overlap(found)})
    return charts


def _overlap(found: dict[str, dict[str, float]]) -> str:
    if len(found) < 2:
        return ""
    before, after = found["before"], found["after"]
    if after["low"] <= before["high"] and before["low"] <= after["high"]:
        return "The ranges overlap: no measurable change."
    return f"The medians differ by a factor of {after['median'] / before['median']:.2f}."
