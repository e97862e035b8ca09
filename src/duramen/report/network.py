"""What the report of a run on images shows of a search for a network: all candidates, the chosen one layer by layer, and what the target spends its time on."""

from __future__ import annotations

from typing import Any

from duramen.report.charts import roofline_chart, scatter_chart

NAMES = {"dsps": "multipliers", "luts": "lookup tables", "flip_flops": "flip-flops", "ramb36": "memory blocks of 36 Kbit"}


def network_section(found: dict[str, Any]) -> dict[str, Any]:
    """All that ``images.html.jinja`` shows of one.

    Args:
        found: ``search`` of a step of ``vit_search``.
    """
    chosen, told = found["chosen"], found["described"]
    points = [(1000 * each["seconds"], each["loss"]) for each in found["tried"]]
    best = [(1000 * each["seconds"], each["loss"]) for each in found["front"]]
    return {
        "words": search_words(found),
        "charts": [
            {"name": "Everything tried, and the front", "svg": scatter_chart(points, best, "milliseconds of an image", "held-out loss")},
            *([{"name": "Roofline", "svg": _roofline(told)}] if "engine" in told else []),
        ],
        "layers": _layers(chosen["architecture"], told["products"], matrices=6 if "engine" in told else 2),
        "width": chosen["architecture"]["width"],
        "source": found["source"],
        "resources": [
            {"name": NAMES[key], "takes": f"{told['takes'][key]:,}", "there": f"{told['there'][key]:,}", "share": f"{told['takes'][key] / told['there'][key]:.0%}"}
            for key in NAMES
        ] if "takes" in told else [],
        "engine": told.get("engine"),
        "lineage": _lineage(found["tried"]),
    }  # fmt: skip


def search_words(found: dict[str, Any]) -> str:
    """Target and outcome in a sentence or two."""
    chosen = found["chosen"]
    rate = 1 / chosen["seconds"]
    of_all = found["multiply_adds"]["chosen"] / found["multiply_adds"]["largest"]
    slack = " Even the largest sub-network is fast enough." if found["all_fast"] else ""
    return (
        f"{rate:,.0f} images per second on {found['on']} ({found['source']}), for a target of {found['target']:,.0f}, with {of_all:.0%} of the largest sub-network's multiply-adds; "
        f"{1 - chosen['wrong']:.1%} of the held-out images are told right before any training of its own. {len(found['tried']):,} candidates were compared.{slack}"
    )


def _layers(architecture: dict[str, Any], products: list[dict[str, Any]], *, matrices: int) -> list[dict[str, Any]]:
    """A row for every layer: sizes, shares of rows with eight bits, and its share of the time."""
    whole = sum(each["seconds"] for each in products)
    inner = products[1:-1]
    rows = []
    for number, (heads, ratio, eight) in enumerate(
        zip(architecture["heads"], architecture["ratios"], architecture["eight"], strict=True)
    ):
        mine = sum(each["seconds"] for each in inner[number * matrices : (number + 1) * matrices])
        rows.append(
            {
                "number": number, "heads": heads, "hidden": round(ratio * architecture["width"]), "time": f"{mine / whole:.1%}",
                "shares": [{"words": f"{share:.0%}", "shade": f"{80 * share:.0f}%"} for share in eight],
            }
        )  # fmt: skip
    return rows


def _lineage(tried: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best after every generation, where it got better."""
    rows: list[dict[str, Any]] = []
    for generation in sorted({each["generation"] for each in tried}):
        best = min((each for each in tried if each["generation"] <= generation), key=lambda each: each["loss"])
        if not rows or best["loss"] < rows[-1]["loss"]:
            rows.append(
                {
                    "generation": generation,
                    "loss": best["loss"],
                    "words": f"{best['loss']:.4f}",
                    "rate": f"{1 / best['seconds']:,.0f}",
                }
            )
    return rows


def _roofline(told: dict[str, Any]) -> str:
    """Products by their multiply-adds per bit that is loaded, and per cycle."""
    engine = told["engine"]
    peak = engine["lanes"] * engine["inputs"] * engine["tokens"]
    points = []
    for each in told["products"]:
        if each["kind"] == "linear":
            of_lanes = 2 * each["pairs"] * each["features"]
            work = of_lanes * each["tokens"]
            points.append((work / (4 * of_lanes), work / (each["seconds"] * engine["clock"])))
    return roofline_chart(
        points, peak, told["bits_per_cycle"], "products of four bits per bit of weights", "products per cycle"
    )


def export_words(exports: list[dict[str, Any]]) -> list[str]:
    """What was written for other programs, and how it was proved."""
    found = []
    for each in exports:
        if each["format"] == "simulated":
            cycles = ", ".join(
                f"{one['name']} in {one['cycles']:,} cycles (modelled: {one['modelled']:,})" for one in each["matrices"]
            )
            found.append(f"The simulated engine gave every sum bit for bit: {cycles}.")
            continue
        equal = (
            f"all {each['equal_matrices']} matrices give the bits of whole numbers, and " if "equal_matrices" in each else ""
        )
        found.append(
            f"{each['file']}, {each['bytes'] / 1e6:.2f} MB, opened again: {equal}logits differ by at most {each['largest_difference']:.3g}, where the largest is {each['largest_logit']:.3g}."
        )
    return found
