"""Claim: ADMM's masks, solved exactly, leave less error than one-sweep masks, and exchanges leave a little less still.

    python benchmarks/mask_search.py
    python benchmarks/mask_search.py --model gemma3-270m --sequences 16 --targets 60% --text wiki.test.raw

Takes twelve layers of a dense model (every role but k and v, in an early, a middle and a late block) with the Gram of
calibration tokens, prunes each at damping 0.01 in every way, and takes the relative error on those tokens, on sequences
that were held out, and with `--text` on a text of another kind, as means over the layers, and the summed seconds. Adds to
benchmarks/results/mask_search.csv what is not there. About 10 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import rows
from duramen.assets import open_model
from duramen.calibrate.statistics import Statistics
from duramen.calibrate.tokens import calibration_tokens, evaluation_tokens
from duramen.calibrate.walker import Walk, walk_blocks
from duramen.families.model import BlockModel, Layer
from duramen.prune import multiweight, sparsegpt
from duramen.prune.factor import factorise
from duramen.prune.pattern import parse_pattern
from duramen.prune.reconstruct import output_error, reconstruct
from duramen.prune.support import admm, rounds, swap

CORPORA = ("squad", "coqa", "drop", "sciriff")
DEPTHS, ROLES = (0.1, 0.48, 0.9), ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
TARGETS = {"50%": {"sparsity": 0.5}, "60%": {"sparsity": 0.6}, "70%": {"sparsity": 0.7}, "2:4": {"pattern": "2:4"}}
DAMPING = 0.01
NAMES = {"smollm2-135m": "SmolLM2-135M"}
WINDOWS, WINDOW = 10, 1024
"""Of the other text."""


def _searched(weight: torch.Tensor, gram: torch.Tensor, where: dict[str, Any], search: Callable[..., Any]) -> torch.Tensor:
    factor = factorise(gram, DAMPING)
    found = search(weight, factor, parse_pattern(**where))
    return reconstruct(weight, gram, found.pruned, damping=DAMPING, factor=factor, start=found.weight).weight


def _sweep(weight: torch.Tensor, gram: torch.Tensor, where: dict[str, Any]) -> torch.Tensor:
    mask = "joint" if "pattern" in where else "single"
    return multiweight.prune(weight, gram, mask=mask, damping=DAMPING, **where).weight


SUBJECTS: dict[str, Callable[[torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]] = {
    "SparseGPT": lambda weight, gram, where: sparsegpt.prune(weight, gram, damping=DAMPING, **where).weight,
    "SparseGPT's mask, exact": lambda weight, gram, where: (
        multiweight.prune(weight, gram, mask="sparsegpt", damping=DAMPING, **where).weight
    ),
    "one sweep, 3 iterations": lambda weight, gram, where: (
        multiweight.prune(weight, gram, effort="fast", damping=DAMPING, **where).weight
    ),
    "one sweep, exact": _sweep,
    "rounds, exact": lambda weight, gram, where: _searched(weight, gram, where, rounds),
    "ADMM from 0.3, exact": lambda weight, gram, where: _searched(weight, gram, where, admm),
    "ADMM from 0.1, exact": lambda weight, gram, where: _searched(
        weight, gram, where, lambda *layer: admm(*layer, penalty=0.1)
    ),
    "ADMM from 0.1, exchanges, exact": lambda weight, gram, where: _searched(
        weight, gram, where, lambda w, factor, target: swap(w, factor, admm(w, factor, target, penalty=0.1), target)
    ),
}


def main() -> None:
    """Runs what is missing of the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--targets", nargs="*", default=["50%", "70%", "2:4"])
    parser.add_argument("--text", default="")
    options = parser.parse_args()
    folder = open_model(options.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = calibration_tokens(tokenizer, CORPORA, sequences=options.sequences, length=512, seed=0)
    model = BlockModel.from_folder(folder)
    chosen = {int(depth * len(model.blocks)) for depth in DEPTHS}
    where = model.layer_names()
    names = [name for name in where if name.split(".", 3)[-1] in ROLES and where[name][1] in chosen]
    layers = _seen(model, tokens, names, held_out_every=8)
    grams = {"relative error": [layer[1] for layer in layers], "held-out relative error": [layer[2] for layer in layers]}
    if options.text:
        other = evaluation_tokens(tokenizer, options.text, windows=WINDOWS, length=WINDOW)
        grams[f"relative error on {Path(options.text).name}"] = [layer[1] for layer in _seen(model, other, names)]
    table = rows.read("mask_search")
    for label in options.targets:
        case = f"{NAMES.get(options.model, options.model)}, {label}"
        for subject, prune in SUBJECTS.items():
            if any((row["case"], row["subject"]) == (case, subject) for row in table):
                continue
            start = time.perf_counter()
            found = [prune(weight, seen, TARGETS[label]) for weight, seen, _ in layers]
            seconds = time.perf_counter() - start
            for metric, sums in grams.items():
                errors = torch.tensor([
                    output_error(weight, new, gram) / output_error(weight, 0 * new, gram)
                    for (weight, *_), new, gram in zip(layers, found, sums, strict=True)
                ])  # fmt: skip
                table.append(_row(table, case, metric, "1", subject, float(errors.mean()), len(layers)))
            table.append(_row(table, case, "seconds", "s", subject, seconds, 1))
            rows.write("mask_search", table)
            print(label, subject, {row["metric"]: float(row["value"]) for row in table[-len(grams) - 1 :]}, flush=True)


def _seen(model: BlockModel, tokens: torch.Tensor, names: list[str], held_out_every: int = 0) -> list[tuple[torch.Tensor, ...]]:
    """Of every layer its weight, and the Grams of what the dense model feeds it and of what was held out of that."""
    layers = []

    def keep(_: list[Layer], statistics: Statistics) -> Callable[[Layer], dict[str, Any]]:
        def one(layer: Layer) -> dict[str, Any]:
            aside = statistics.held_out
            layers.append(
                (layer.read().float(), statistics.train.second, statistics.train.second if aside is None else aside.second)
            )
            return {}

        return one

    walk_blocks(model, tokens, keep, names, walk=Walk(), held_out_every=held_out_every)
    return layers


def _row(
    table: list[dict[str, object]], case: str, metric: str, unit: str, subject: str, value: float, samples: int
) -> dict[str, object]:
    more = rows.beside(rows.peer_of(table, case, metric, "SparseGPT")) if subject != "SparseGPT" else {}
    return rows.row(case, metric, unit, subject, value, samples=samples, **more)


if __name__ == "__main__":
    main()
