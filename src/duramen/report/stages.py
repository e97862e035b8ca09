"""What the page shows of a training from text: of every stage a sentence, a table, its curves, and samples; and a page that is renewed while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from duramen.report.charts import line_chart
from duramen.rundir import write_text

LIVE = "progress.html"
SHOWN = 8
"""Answers of a tuned model that the page shows."""
Found = dict[str, Any]


def stage_sections(stages: Sequence[Found]) -> list[Found]:
    """Of every stage: ``title``, ``words``, ``head`` and ``rows`` of a table, ``charts`` and ``samples``.

    Args:
        stages: Of ``results.json``.
    """
    return [_section(stage) for stage in stages]


def _section(stage: Found) -> Found:
    title, tell = SECTIONS[stage["method"]]
    minutes = f"{stage['seconds'] / 60:.1f} minutes" + (f", {stage['joules'] / 1000:,.1f} kJ" if stage["joules"] else "")
    blank: Found = {"head": (), "rows": [], "charts": [], "samples": [], "words": ""}
    settings = {key: value for key, value in stage["settings"].items() if key not in ("id", "method")}
    return (
        blank
        | tell(stage["found"])
        | {"title": title, "id": stage["id"], "named": stage["id"] != stage["method"], "took": minutes, "settings": settings}
    )


def _curated(found: Found) -> Found:
    rows = [
        (each["filter"], f"{each['in']:,}", f"{each['out']:,}", f"{1 - each['out'] / max(1, each['in']):.1%}", ", ".join(f"{name} {count:,}" for name, count in each["reasons"].items()))
        for each in found["filters"]
    ]  # fmt: skip
    sources = [
        f"{name} ({found['licences'][name]}): {each['documents']:,} documents, {each['bytes'] / 1e6:.1f} MB"
        for name, each in found["sources"].items()
    ]
    words = f"{found['documents']['train']:,} documents are learned and {found['documents']['held_out']:,} set apart. {'; '.join(sources)}."
    samples = [(f"dropped by {name}", text) for name, texts in found["samples"].items() for text in texts[:1]]
    return {"words": words, "head": ("Filter", "In", "Out", "Dropped", "Why"), "rows": rows, "samples": samples}


def _tokenized(found: Found) -> Found:
    tokens = sum(found["tokens"]["train"].values())
    words = (
        f"{found['vocabulary']:,} tokens. On what is set apart {found['bytes_per_token']:.2f} bytes a token and {found['tokens_per_word']:.2f} tokens "
        f"a word. {tokens / 1e6:,.2f} million tokens to learn from."
    )
    rows = [
        (name, f"{count:,}", f"{found['tokens']['held_out'].get(name, 0):,}")
        for name, count in found["tokens"]["train"].items()
    ]
    return {"words": words, "head": ("Source", "Tokens to learn", "Set apart"), "rows": rows}


def _pretrained(found: Found) -> Found:
    (_, before), *_, (_, after) = found["held_out"]
    speed = f"{found['tokens_per_second']:,.0f} tokens a second" if found["tokens_per_second"] else "too short to time"
    used = (
        f", {found['utilised']:.0%} of the machine's float32 peak ({found['keys_counted']} attention counted)"
        if found["utilised"]
        else ""
    )
    words = (
        f"{found['parameters'] / 1e6:,.2f} million parameters, {len(found['losses']):,} steps on rows of {found['context']}; held-out loss {before:.3f} before, "
        f"{after:.3f} after. {speed}{used}. {len(found['skipped'])} steps were left out; the last learning rate was {found['last_rate']:.3f} of the highest."
    )
    rows = [
        (name, f"{count:,}", f"{found['epochs'][name]:.2f}", f"{found['utilisation'][name]:.1%}", f"{found['cut'][name]:.1%}")
        for name, count in found["sources"].items()
    ]
    charts = [
        ("Loss of every step", _curve(list(enumerate(found["losses"], 1)), "loss")),
        ("Held-out loss", _curve(found["held_out"], "held-out loss")),
    ]
    if found.get("by_place"):
        charts += [
            (f"Held-out loss by place in the row, {when}", line_chart(list(enumerate(values, 1)), "eighth of the row", "loss"))
            for when, values in found["by_place"].items()
        ]
    return {
        "words": words,
        "head": ("Source", "Target tokens seen", "Times", "Places filled", "Cut from their beginning"),
        "rows": rows,
        "charts": charts,
    }


def _grown(found: Found) -> Found:
    blocks = found["blocks"]
    words = f"{blocks['before']} blocks became {blocks['after']}; the new ones are {', '.join(map(str, found['new']))}. Logits differ by at most {found['largest_difference']:.2g}."
    return {"words": words}


def _tuned(found: Found) -> Found:
    counts = [f"{found[key]:,} {name}" for key, name in (("examples", "examples"), ("prompts", "prompts")) if key in found]
    words = f"{', '.join(counts)}, {found['steps']:,} steps."
    if found["held_out"]:
        words += f" Held-out loss {found['held_out'][-1][1]:.3f} at the end."
    charts = [("Loss of every step", _curve(list(enumerate(found["losses"], 1)), "loss"))]
    if found.get("rewards"):
        charts = [("Reward of every step", _curve(list(enumerate(found["rewards"], 1)), "mean reward"))]
    samples: list[tuple[str, str]] = []
    rows: list[tuple[str, ...]] = []
    if found.get("exercises"):
        rows = [
            (f"{when}, {what}", f"{each['share']:.1%}", f"{each['low']:.1%} to {each['high']:.1%}", f"{counted['count']:,}")
            for when, counted in found["exercises"].items()
            for what, each in (("to the letter", counted), ("in the form asked for", counted["form"]))
        ]
        samples = [(asked, said or "nothing") for asked, _, said in found["exercises"]["after"]["answers"][:SHOWN]]
        words += " Held-out exercises, answered greedily:"
    return {
        "words": words,
        "head": ("", "Right", "95 % interval", "Exercises") if rows else (),
        "rows": rows,
        "charts": charts,
        "samples": samples,
    }


def _curve(points: Sequence[Sequence[float]], up: str) -> str:
    """A line of at most 200 points, or nothing for fewer than two."""
    step = max(1, len(points) // 200)
    return line_chart([(float(x), float(y)) for x, y in points[::step]], "steps", up) if len(points) > 1 else ""


SECTIONS: dict[str, tuple[str, Callable[[Found], Found]]] = {
    "curate": ("Curation", _curated), "tokenize": ("Tokenizer", _tokenized), "pretrain": ("Pretraining", _pretrained), "grow": ("Depth expansion", _grown),
    "extend": ("Context extension", _pretrained), "sft": ("Supervised tuning", _tuned), "dpo": ("Preference optimisation", _tuned),
    "grpo": ("Optimisation by rewards", _tuned),
}  # fmt: skip


def write_live(folder: Path, points: dict[str, list[tuple[int, float]]]) -> None:
    """Writes ``progress.html``, which loads itself anew every ten seconds.

    Args:
        folder: Of the stages.
        points: (steps done, held-out loss) of every stage so far.
    """
    parts = [
        f"<h2>{name}</h2>{_curve(each, 'held-out loss')}<p>{each[-1][0]:,} steps: {each[-1][1]:.4f}</p>"
        for name, each in points.items()
    ]
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    head = f'<meta charset="utf-8"><meta http-equiv="refresh" content="10"><title>Training</title><style>{style}</style>'
    write_text(
        folder / LIVE,
        f'<!doctype html><html lang="en"><head>{head}</head><body><h1>Training</h1>{"".join(reversed(parts))}</body></html>',
    )
