"""Claim: at equal tokens and damping, multi-weight pruning is nearer to the dense model than magnitude, Wanda and SparseGPT.

    python benchmarks/pruning_quality.py --text wiki.test.raw        # WikiText-2-raw test; any text file works

Prunes SmolLM2-135M by every method at every pattern from the same calibration tokens, and measures perplexity, KL from the
dense model and the summed relative layer error. Multi-weight takes the paper's masks and target here, from one sweep, and solves them exactly. Writes
benchmarks/results/pruning_quality.csv after every run. About 60 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import rows
from duramen.assets import open_model
from duramen.calibrate.tokens import calibration_tokens, evaluation_tokens
from duramen.evaluate.perplexity import Divergence, divergence, final_hidden, perplexity
from duramen.families.model import BlockModel
from duramen.hardware.machine import fastest_device
from duramen.intervals import Measured, mean_interval
from duramen.registry import get_method
from wikitext import literature

CORPORA = ("squad", "coqa", "drop", "sciriff")
TARGETS = {
    "50%": {"sparsity": 0.5},
    "60%": {"sparsity": 0.6},
    "70%": {"sparsity": 0.7},
    "2:4": {"pattern": "2:4"},
}
SUBJECTS = ("magnitude", "wanda", "sparsegpt", "multiweight")


def arguments(targets: Iterable[str], subjects: Iterable[str]) -> argparse.ArgumentParser:
    """What every benchmark of pruned models takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", default="boolq")
    parser.add_argument("--calibration", nargs="*", default=list(CORPORA))
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--targets", nargs="*", default=list(targets))
    parser.add_argument("--subjects", nargs="*", default=list(subjects))
    return parser


def main() -> None:
    """Runs the table."""
    parser = arguments(TARGETS, SUBJECTS)
    parser.add_argument("--name", default="pruning_quality")
    parser.add_argument("--damping", default="0.01")
    options = parser.parse_args()
    damping = options.damping if options.damping == "held-out" else float(options.damping)

    bench = Bench.open(options)
    case = f"SmolLM2-135M, {bench.tokens.numel()} tokens, {Path(options.text).name} {options.windows}x{options.window}, damping {damping}"
    table = [bench.row(f"{case}, dense", "perplexity", "dense", perplexity(bench.reference.loss))]
    for label in options.targets:
        peers: dict[str, Measured] = {}
        for subject in options.subjects:
            settings = TARGETS[label] | ({"damping": damping} if subject in ("sparsegpt", "multiweight") else {})
            if subject == "multiweight":
                settings |= {"mask": "joint" if "pattern" in settings else "single", "dense_target": 0.0}
            figures = bench.measure(subject, settings)
            del figures["processor seconds"]
            if subject == "sparsegpt":
                peers = figures
            for metric, figure in figures.items():
                peer = ("sparsegpt", peers[metric].value) if subject == "multiweight" and peers else None
                table.append(bench.row(f"{case}, {label}", metric, subject, figure, peer))
            rows.write(options.name, table)


UNITS = {
    "held-out loss": "nats",
    "perplexity": "1",
    "KL from dense": "nats",
    "summed relative layer error": "1",
    "processor seconds": "s",
}


@dataclass
class Bench:
    """One model with its tokens, its evaluation windows [S, T], and what the dense model says of them."""

    folder: Path
    tokens: torch.Tensor
    windows: torch.Tensor
    dense: BlockModel
    hidden: list[torch.Tensor]
    reference: Divergence

    @classmethod
    def open(cls, options: argparse.Namespace) -> Bench:
        """Opens the model and runs it dense."""
        folder = open_model(options.model)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokens = calibration_tokens(tokenizer, options.calibration, sequences=options.sequences, length=options.length, seed=0)
        windows = evaluation_tokens(tokenizer, literature(options.text), length=options.window, windows=options.windows)
        dense = BlockModel.from_folder(folder, device=fastest_device())
        hidden = final_hidden(dense, windows)
        return cls(folder, tokens, windows, dense, hidden, divergence(dense, hidden, dense, hidden, windows))

    def measure(self, method: str, settings: dict[str, object]) -> dict[str, Measured]:
        """Prunes a fresh float32 copy and measures it."""
        network = AutoModelForCausalLM.from_pretrained(self.folder, dtype="float32").to(fastest_device())
        start = time.process_time()
        records = get_method(method).apply(network, self.tokens, **settings)
        seconds = time.process_time() - start
        more = {
            "summed relative layer error": sum(record["relative_error"] for record in records),
            "processor seconds": seconds,
        }
        figures = self.judge(network) | {name: exactly(value) for name, value in more.items()}
        print(method, settings, {name: round(figure.value, 4) for name, figure in figures.items()}, flush=True)
        return figures

    def judge(self, network: nn.Module) -> dict[str, Measured]:
        """How far an edited network is from the dense one."""
        edited = BlockModel.from_module(network)
        found = divergence(self.dense, self.hidden, edited, final_hidden(edited, self.windows), self.windows)
        return {"perplexity": perplexity(found.loss), "KL from dense": mean_interval(found.kl)}

    def row(
        self, case: str, metric: str, subject: str, figure: Measured, peer: tuple[str, float] | None = None, used: str = ""
    ) -> dict[str, object]:
        """One row of a results file; ``used`` are versions of a peer."""
        more = {"low": figure.low, "high": figure.high} if figure.low < figure.high else {}
        more |= rows.beside(peer) | ({"versions": rows.versions(used)} if used else {})
        return rows.row(case, metric, UNITS[metric], subject, figure.value, samples=figure.samples, **more)


def exactly(value: float) -> Measured:
    """One figure without a spread."""
    return Measured(value, value, value, 1)


if __name__ == "__main__":
    main()
