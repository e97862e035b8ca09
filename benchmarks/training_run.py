"""Claim: none of its own; puts down what a finished training from text took and reached, so that the docs can quote it.

    python benchmarks/training_run.py out/laptop-10m

Reads results.json of a `duramen train` run: seconds of every stage, speed, held-out loss and bytes of a token, held-out exercises with their intervals, and perplexity in the end. Writes benchmarks/results/training_run.csv, in
the place of an older run of the same recipe. The rows carry the versions and the machine that read them, which should be those that trained.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import rows


def main() -> None:
    """Writes the rows of one run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    results = json.loads((parser.parse_args().run / "results.json").read_text())
    name = results["recipe"]
    table = [row for row in rows.read("training_run") if not str(row["case"]).startswith(f"{name}, ")]
    for stage in results["stages"]:
        found, case = stage["found"], f"{name}, {stage['id']}"
        table.append(rows.row(case, "seconds", "s", "duramen train", stage["seconds"], samples=1))
        if "bytes_per_token" in found:
            table.append(rows.row(case, "bytes per token", "1", "duramen train", found["bytes_per_token"], samples=1))
        if found.get("tokens_per_second"):
            table.append(rows.row(case, "parameters", "1", "duramen train", found["parameters"], samples=1))
            table.append(
                rows.row(case, "target tokens per second", "1/s", "duramen train", found["tokens_per_second"], samples=1)
            )
            table.append(rows.row(case, "share of the float32 peak", "1", "duramen train", found["utilised"], samples=1))
            for label, (_, loss) in (("before", found["held_out"][0]), ("after", found["held_out"][-1])):
                table.append(rows.row(case, f"held-out loss {label}", "nats", "duramen train", loss, samples=1))
        for when, told in (found.get("exercises") or {}).items():
            more = {"low": told["low"], "high": told["high"], "samples": told["count"]}
            table.append(rows.row(case, f"exercises to the letter {when}", "1", "duramen train", told["share"], **more))
    for evaluation in results["evaluations"]:
        for text, told in evaluation["perplexity"].items():
            figure = told.get("after") or told["before"]
            more = {"low": figure["low"], "high": figure["high"], "samples": figure["samples"]}
            table.append(
                rows.row(f"{name}, in the end", f"perplexity on {text}", "1", "duramen train", figure["value"], **more)
            )
    rows.write("training_run", table)


if __name__ == "__main__":
    main()
