"""Claim: ADMM's masks, solved exactly, leave less error than one-sweep masks, and exchanges leave a little less still.

    python benchmarks/mask_search.py

Takes twelve layers of the dense SmolLM2-135M (every role but k and v, in an early, a middle and a late block) with the Gram of
16,384 calibration tokens, prunes each at damping 0.01 in every way, and takes the relative error on those tokens and on sequences
that were held out, as means over the layers, and the summed seconds. Writes benchmarks/results/mask_search.csv. About 10 minutes on 2
cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer

import rows
from duramen.assets import open_model
from duramen.calibrate.statistics import Statistics
from duramen.calibrate.tokens import calibration_tokens
from duramen.calibrate.walker import Walk, walk_blocks
from duramen.families.model import BlockModel, Layer
from duramen.prune import multiweight, sparsegpt
from duramen.prune.factor import factorise
from duramen.prune.pattern import parse_pattern
from duramen.prune.reconstruct import output_error, reconstruct
from duramen.prune.support import admm, rounds, swap

CORPORA = ("squad", "coqa", "drop", "sciriff")
BLOCKS, ROLES = (3, 14, 27), ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
TARGETS = {"50%": {"sparsity": 0.5}, "70%": {"sparsity": 0.7}, "2:4": {"pattern": "2:4"}}
DAMPING = 0.01


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
    """Runs the table."""
    folder = open_model("smollm2-135m")
    tokens = calibration_tokens(AutoTokenizer.from_pretrained(folder), CORPORA, sequences=32, length=512, seed=0)
    model, layers = BlockModel.from_folder(folder), []

    def keep(_: list[Layer], statistics: Statistics) -> Callable[[Layer], dict[str, Any]]:
        assert statistics.held_out is not None

        def one(layer: Layer) -> dict[str, Any]:
            layers.append((layer.read().float(), statistics.train.second, statistics.held_out.second))
            return {}

        return one

    names = [name for name in model.layer_names() if name.split(".", 3)[-1] in ROLES and int(name.split(".")[2]) in BLOCKS]
    walk_blocks(model, tokens, keep, names, walk=Walk(), held_out_every=8)
    table = []
    for label, where in TARGETS.items():
        peer: dict[str, float] = {}
        for subject, prune in SUBJECTS.items():
            start = time.perf_counter()
            found = [prune(weight, seen, where) for weight, seen, _ in layers]
            seconds = time.perf_counter() - start
            for metric, place in (("relative error", 1), ("held-out relative error", 2)):
                errors = torch.tensor([
                    output_error(layer[0], new, layer[place]) / output_error(layer[0], 0 * new, layer[place])
                    for layer, new in zip(layers, found, strict=True)
                ])  # fmt: skip
                mean = float(errors.mean())
                table.append(_row(label, metric, "1", subject, mean, peer, len(layers)))
            table.append(_row(label, "seconds", "s", subject, seconds, peer, 1))
            rows.write("mask_search", table)
            print(label, subject, [float(row["value"]) for row in table[-3:]], flush=True)


def _row(
    label: str, metric: str, unit: str, subject: str, value: float, peer: dict[str, float], samples: int
) -> dict[str, object]:
    first = peer.setdefault(metric, value)
    more = {"peer": "SparseGPT", "peer_value": first} if subject != "SparseGPT" else {}
    return rows.row(f"SmolLM2-135M, {label}", metric, unit, subject, value, samples=samples, **more)


if __name__ == "__main__":
    main()
