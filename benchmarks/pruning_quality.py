"""Claim: at equal tokens and damping, multi-weight pruning is nearer to the dense model than magnitude, Wanda and SparseGPT.

    python benchmarks/pruning_quality.py --text wiki.test.raw        # WikiText-2-raw test; any text file works

Prunes SmolLM2-135M by every method at every pattern from the same calibration tokens, and measures perplexity, KL from the
dense model and the summed relative layer error. Multi-weight takes the paper's masks here, from one sweep, and solves them exactly. Writes benchmarks/results/pruning_quality.csv after every run. About 60 minutes
on 2 cores.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

import rows
from duramen.assets import open_model
from duramen.calibrate.tokens import calibration_tokens, evaluation_tokens
from duramen.evaluate.intervals import mean_interval
from duramen.evaluate.perplexity import divergence, final_hidden, perplexity
from duramen.families.model import BlockModel
from duramen.registry import get_method
from wikitext import literature

CORPORA = ("squad", "coqa", "drop", "sciriff")
TARGETS = {
    "50%": {"sparsity": 0.5},
    "60%": {"sparsity": 0.6},
    "70%": {"sparsity": 0.7},
    "2:4": {"pattern": "2:4"},
}
SUBJECTS = {
    "magnitude": {},
    "wanda": {},
    "sparsegpt": {"damping": 0.01},
    "multiweight": {"damping": 0.01},
}


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", default="boolq")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--name", default="pruning_quality")
    parser.add_argument("--damping", default="0.01")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--subjects", nargs="*", default=list(SUBJECTS))
    options = parser.parse_args()
    damping = options.damping if options.damping == "held-out" else float(options.damping)

    folder = open_model(options.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = calibration_tokens(tokenizer, CORPORA, sequences=options.sequences, length=options.length, seed=0)
    windows = evaluation_tokens(tokenizer, literature(options.text), length=options.window, windows=options.windows)
    dense = BlockModel.from_folder(folder)
    hidden = final_hidden(dense, windows)
    base = divergence(dense, hidden, dense, hidden, windows)
    text, table = Path(options.text).name, []
    case = f"SmolLM2-135M, {tokens.numel()} tokens, {text} {options.windows}x{options.window}, damping {damping}"
    figure = perplexity(base.loss)
    interval = {"low": figure.low, "high": figure.high, "samples": figure.samples}
    table.append(rows.row(f"{case}, dense", "perplexity", "1", "dense", figure.value, **interval))

    for label in options.targets:
        peers: dict[str, float] = {}
        for subject in options.subjects:
            settings = TARGETS[label] | SUBJECTS[subject] | ({"damping": damping} if "damping" in SUBJECTS[subject] else {})
            if subject == "multiweight":
                settings["mask"] = "joint" if "pattern" in settings else "single"
            start = time.perf_counter()
            network = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
            records = get_method(subject).apply(network, tokens, **settings)
            seconds = time.perf_counter() - start
            edited = BlockModel.from_module(network)
            found = divergence(dense, hidden, edited, final_hidden(edited, windows), windows)
            error = float(np.sum([record["relative_error"] for record in records]))
            figures = {
                "perplexity": ("1", perplexity(found.loss)),
                "KL from dense": ("nats", mean_interval(found.kl)),
            }
            for metric, (unit, figure) in figures.items():
                table.append(_row(f"{case}, {label}", metric, unit, subject, figure.value, peers, *_measured(figure)[1:]))
            table.append(_row(f"{case}, {label}", "summed relative layer error", "1", subject, error, peers))
            rows.write(options.name, table)
            print(label, subject, f"{seconds:.0f} s", {metric: round(figure.value, 4) for metric, (_, figure) in figures.items()},
                  f"error {error:.4f}", flush=True)  # fmt: skip


def _measured(figure: object) -> tuple[float, float, float, int]:
    return figure.value, figure.low, figure.high, figure.samples  # type: ignore[attr-defined]


def _row(
    case: str, metric: str, unit: str, subject: str, value: float, peers: dict[str, float], *interval: float
) -> dict[str, object]:
    if subject == "sparsegpt":
        peers[metric] = value
    more = dict(zip(("low", "high", "samples"), interval, strict=False))
    if subject == "multiweight" and metric in peers:
        more |= {"peer": "sparsegpt", "peer_value": peers[metric]}
    return rows.row(case, metric, unit, subject, value, **more)


if __name__ == "__main__":
    main()
