"""Claim: what the dial makes is what was asked for, within five percent, or it is refused before anything runs.

    python benchmarks/dial.py smollm2-135m --for llama.cpp --targets 0.5x 0.4x 0.3x
    python benchmarks/dial.py out/laptop-10m --for cpu --targets 0.8x 1.3x-faster

Runs `duramen compress` for every target and puts down what was asked for and what was reached, bytes or a factor of speed, the perplexity before and after, and the minutes. Writes benchmarks/results/dial.csv
after every run, in the place of an older one. Ten to thirty minutes a target on SmolLM2 and 2 threads.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import rows
from duramen import api
from duramen.hardware.clock import now
from duramen.problem import Exit, Problem


def main() -> None:
    """Runs all targets."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--for", dest="place", default="llama.cpp")
    parser.add_argument("--targets", nargs="+", default=["0.5x", "0.4x", "0.3x"])
    parser.add_argument("--text", default="boolq")
    options = parser.parse_args()
    for target in options.targets:
        case = f"{Path(options.model).name}, {target} for {options.place}"
        table = [row for row in rows.read("dial") if row["case"] != case]
        table += measured(options.model, target, options.place, options.text, case)
        rows.write("dial", table)


def measured(model: str, target: str, place: str, text: str, case: str) -> list[dict[str, object]]:
    """The rows of one target."""
    begun = now()
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = api.compress(model, Path(folder) / "out", target=target, place=place, text=(text,))
        except Problem as problem:
            print(case, problem, flush=True)
            if problem.code != Exit.OUT_OF_BUDGET:
                raise
            return [rows.row(case, "refused", "1", "duramen compress", 1.0, samples=1)]
    dial, (quality,) = found["dial"], found["evaluations"][-1]["perplexity"].values()
    met = dial["reached"] / dial["asked"]
    print(case, dial, {when: each["value"] for when, each in quality.items() if isinstance(each, dict)}, flush=True)
    made = [rows.row(case, "reached of what was asked", "1", "duramen compress", met, samples=1)]
    for when in ("before", "after"):
        if when in quality:
            each = quality[when]
            told = {"low": each["low"], "high": each["high"], "samples": each["samples"]}
            made.append(rows.row(case, f"perplexity {when}", "1", "duramen compress", each["value"], **told))
    return [*made, rows.row(case, "minutes", "min", "duramen compress", (now() - begun) / 60, samples=1)]


if __name__ == "__main__":
    main()
