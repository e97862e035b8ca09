"""Claim: the exact reformation is at least as near to the layer's output as the published iteration, at any penalty, on every layer.

    python benchmarks/reformation.py

Cuts half of the input columns of every projection of SmolLM2-135M that reads units, those of least Wanda-sp score, and re-fits the rest: exactly (undamped and damped),
by ADMM as published with its mistakes repaired (30 iterations, penalties of 0.01 to 100 on the Gram as it is and
on the one of unit diagonal), and not at all. Records for every way the mean over layers of the squared output error relative to the squared output,
and on how many layers the exact solution's is the larger one. Writes benchmarks/results/reformation.csv. About 25 minutes on one core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

import rows
from duramen.assets import open_model
from duramen.calibrate.statistics import Statistics
from duramen.calibrate.tokens import calibration_tokens
from duramen.calibrate.walker import Walk, walk_blocks
from duramen.families.model import BlockModel, Layer
from duramen.prune.reconstruct import output_error
from duramen.shrink.groups import find_units
from duramen.shrink.importance import wanda_sp
from duramen.shrink.reform import alternating, reform
from pruning_quality import CORPORA

PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)
EXACT = "exact"


def compare(layer: Layer, gram: Tensor) -> dict[str, float]:
    """Relative squared errors of all ways on one layer."""
    weight, gram = layer.read().double(), gram.double()
    columns = wanda_sp(weight, gram.diagonal()).argsort()[: len(gram) // 2]
    scale = gram.diagonal().clamp_min(1e-30).sqrt()
    ways = {"none": weight.index_fill(1, columns, 0), EXACT: reform(weight, gram, columns=columns, damping=1e-9).weight}
    ways["exact, damping 0.01"] = reform(weight, gram, columns=columns, damping=0.01).weight
    for penalty in PENALTIES:
        ways[f"ADMM, penalty {penalty:g}"] = alternating(weight, gram, columns, penalty=penalty)
        unit = alternating(weight * scale, gram / torch.outer(scale, scale), columns, penalty=penalty)
        ways[f"ADMM, unit diagonal, penalty {penalty:g}"] = unit / scale
    whole = output_error(weight, torch.zeros_like(weight), gram)
    return {name: output_error(weight, found, gram) / whole for name, found in ways.items()}


def main() -> None:
    """Runs the table."""
    folder = open_model("smollm2-135m")
    tokens = calibration_tokens(AutoTokenizer.from_pretrained(folder), CORPORA, sequences=32, length=512, seed=0)
    model = BlockModel.from_folder(folder)
    readers = list(dict.fromkeys(units.reader for units in find_units(model, ("kv_group", "ffn_channel"))))
    found: list[dict[str, float]] = []

    def look(_: list[Layer], statistics: Statistics) -> Callable[[Layer], dict[str, Any]]:
        def measure(layer: Layer) -> dict[str, Any]:
            found.append(compare(layer, statistics.total.second))
            print(layer.name, {name: f"{error:.2e}" for name, error in found[-1].items()}, flush=True)
            return {}

        return measure

    walk_blocks(model, tokens, look, readers, walk=Walk())
    case, table = f"SmolLM2-135M, {tokens.numel()} tokens, half of the columns", []
    exact = sum(errors[EXACT] for errors in found) / len(found)
    for name in found[0]:
        mean = sum(errors[name] for errors in found) / len(found)
        peer = {} if name == EXACT else {"peer": EXACT, "peer_value": exact}
        worse = sum(errors[EXACT] > errors[name] * (1 + 1e-9) for errors in found)
        table.append(rows.row(case, "mean relative error", "1", name, mean, samples=len(found), **peer))
        table.append(rows.row(case, "layers where exact is worse", "1", name, worse, samples=len(found)))
    rows.write("reformation", table)


if __name__ == "__main__":
    main()
