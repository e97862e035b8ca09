"""Claim: methods that follow one another lie beyond what each reaches alone at the same bits.

    python benchmarks/compositions.py --text wiki.test.raw
    python benchmarks/compositions.py --text wiki.test.raw --subjects "gptq" "rotate, gptq"

Runs recipes on SmolLM2-135M, all from the same calibration tokens and all ending at the same bits a weight, and measures KL from the dense model and perplexity on the same windows, and the processor seconds of the
whole run. Writes benchmarks/results/compositions.csv after every run; runs that stand there are left out. Ten minutes a rounding and thirty a training on 1 thread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import duramen
import rows

ROUNDED = {"method": "gptq", "format": "W3 g64"}
HEALED = {"method": "rora", "steps": 40, "batch": 8, "at_once": 2, "rank": 16, "every": 20}
SUBJECTS = {
    "rtn": [{"method": "rtn", "format": "W3 g64"}],
    "gptq": [ROUNDED],
    "rotate, gptq": [{"method": "rotate"}, ROUNDED],
    "gptq, rora": [ROUNDED, HEALED],
    "rotate, gptq, rora": [{"method": "rotate"}, ROUNDED, HEALED],
}
PEER = "gptq"


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", default="boolq")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--subjects", nargs="*", default=list(SUBJECTS))
    options = parser.parse_args()
    case = f"{options.model}, 16384 tokens, {Path(options.text).name} {options.windows}x{options.window}, W3 g64"
    measured = {
        "method": "evaluate",
        "text": [options.text],
        "windows": options.windows,
        "length": options.window,
        "latency": False,
    }
    table = rows.read("compositions")
    for subject in options.subjects:
        if any((row["case"], row["subject"]) == (case, subject) for row in table):
            continue
        recipe = {"calibration": {"sequences": 32, "length": 512}, "steps": [*SUBJECTS[subject], measured]}
        begun = time.process_time()
        with tempfile.TemporaryDirectory() as place:
            found = duramen.run(recipe, options.model, Path(place) / "out")
        spent = time.process_time() - begun
        (told,) = found["evaluations"][-1]["perplexity"].values()
        figures = {"perplexity": told["after"], "KL from dense": told["kl"]}
        for metric, figure in figures.items():
            peer = next(
                (float(row["value"]) for row in table if (row["case"], row["subject"], row["metric"]) == (case, PEER, metric)),
                None,
            )
            more = {"low": figure["low"], "high": figure["high"], "samples": figure["samples"]} | rows.beside(
                None if peer is None else (PEER, peer)
            )
            table.append(rows.row(case, metric, "nats" if metric.startswith("KL") else "1", subject, figure["value"], **more))
        table.append(rows.row(case, "processor seconds", "s", subject, spent, samples=1))
        rows.write("compositions", table)
        print(subject, {metric: figure["value"] for metric, figure in figures.items()}, round(spent), flush=True)


if __name__ == "__main__":
    main()
