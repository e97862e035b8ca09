"""Claim: small steps teach a small model to copy, and old text among the new keeps its prose.

    python benchmarks/replay.py out/laptop-10m

Tunes the pretrained model of a finished `duramen train laptop-10m` on all 12,000 exercises three times, at a rate of 0.0005: in steps of eight rows of 256 tokens, of two, and of two with four tenths of the
tokens taken from the old text. Counts what 200 held-out exercises are answered, and takes perplexity on BoolQ, which the corpus was cleared of. Writes benchmarks/results/replay.csv after every run; runs that
stand there are left out. Ten to twenty-five minutes a run on 1 thread.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import rows
from duramen import api
from duramen.train import sft
from duramen.train.stage import Stage

WAYS = {
    "steps of 8 rows": {"batch": 8},
    "steps of 2 rows": {"batch": 2},
    "steps of 2 rows, 0.4 replayed": {"batch": 2, "replay": 0.4},
}
CASE = "laptop-10m, sft on 12,000 exercises"
FIXED = {
    "data": "exercises",
    "epochs": 1,
    "at_once": 2,
    "learning_rate": 5e-4,
    "length": 256,
    "every": 100,
    "held_out": 0.02,
    "measure": 200,
}


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    stages = parser.parse_args().run / "stages"
    given = {"model": next(stages.glob("*-pretrain")) / "model", "tokens": next(stages.glob("*-tokenize")) / "tokens"}
    table = rows.read("replay")
    if not any(row["subject"] == "pretrained" for row in table):
        table += prose(given["model"], "pretrained")
    for way, settings in WAYS.items():
        if any(row["subject"] == way for row in table):
            continue
        with tempfile.TemporaryDirectory() as place:
            stage = Stage(Path(place), given, 0)
            told = sft.apply(stage, sft.Settings(**FIXED | settings))["exercises"]["after"]
            table += told_rows(told, way) + prose(stage.folder / "model", way)
        rows.write("replay", table)


def told_rows(told: dict, way: str) -> list[dict[str, object]]:
    """What was answered to the letter, and in the form that was asked for."""
    figures = {"to the letter": told, "in the form": told["form"]}
    return [
        rows.row(
            CASE,
            f"held-out exercises {name}",
            "1",
            way,
            each["share"],
            low=each["low"],
            high=each["high"],
            samples=told["count"],
        )
        for name, each in figures.items()
    ]


def prose(folder: Path, way: str) -> list[dict[str, object]]:
    """Perplexity on BoolQ."""
    found = api.evaluate(str(folder), text=["boolq"], tasks=[], windows=20, length=256, latency=False)["perplexity"]["boolq"][
        "before"
    ]
    told = {"low": found["low"], "high": found["high"], "samples": found["samples"]}
    return [rows.row(CASE, "perplexity on boolq", "1", way, found["value"], **told)]


if __name__ == "__main__":
    main()
