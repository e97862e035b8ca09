"""Claim: patches that leave after 5, 10 and 15 of 24 layers, to save 40 % of the multiply-adds, make Vim-Tiny and PlainMamba-L1 at least 1.4 times as fast, 16 images at once.

    python benchmarks/vision_speed.py

Random weights of the official shapes, images of 224 pixels, 16 at once and one alone, all threads: images per second with and without patches that leave, median and range of three repeats in turn, and where the
time of the reduced model goes, by kind of operation. Writes benchmarks/results/vision_speed.csv. About 3 minutes on 2 cores; nothing else should run.
"""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import rows
from duramen.hardware.clock import now
from duramen.tokens.schedule import solve_keep, vision_sites
from duramen.vision import PlainMambaConfig, PlainMambaForImageClassification, VimConfig, VimForImageClassification
from duramen.vision.cost import patch_costs, sequence_length

MODELS = {
    "Vim-Tiny": lambda: VimForImageClassification(VimConfig(num_labels=1000)),
    "PlainMamba-L1": lambda: PlainMambaForImageClassification(
        PlainMambaConfig(local=True, num_labels=1000, official_pairing=True, double_dt_bias=True)
    ),
}
CUT, REPEATS = 0.4, 3
KINDS = {
    "products of matrices": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul"),
    "convolutions": ("aten::mkldnn_convolution", "aten::convolution", "aten::_slow_conv2d_forward", "aten::thnn_conv2d"),
    "moving": ("aten::gather", "aten::scatter", "aten::copy_", "aten::cat", "aten::index", "aten::sort", "aten::flip"),
}
"""The rest is element by element, most of it the scan."""


@torch.no_grad()
def main() -> None:
    """Runs the table."""
    table: list[dict[str, object]] = []
    for name, make in MODELS.items():
        torch.manual_seed(0)
        dense = make().eval()
        reduced, sites = copy.deepcopy(dense), vision_sites(24)
        keep = solve_keep(patch_costs(dense), sites, CUT, tokens=sequence_length(dense))
        reduced.config.reduction = {"sites": sites, "keep": [keep]}
        for batch in (16, 1):
            case, pixels = f"{name}, {sequence_length(dense)} tokens, batch {batch}", torch.randn(batch, 3, 224, 224)
            rates = _in_turn({"dense": dense, f"{CUT:.0%} cut": reduced}, pixels)
            for subject, found in rates.items():
                spread = {"low": float(found.min()), "high": float(found.max()), "samples": REPEATS}
                against = {} if subject == "dense" else {"peer": "dense", "peer_value": float(np.median(rates["dense"]))}
                table.append(rows.row(case, "images per second", "1/s", subject, float(np.median(found)), **spread, **against))
                print(case, subject, round(float(np.median(found)), 3), flush=True)
            for kind, share in _shares(reduced, pixels).items():
                table.append(rows.row(case, f"share of time: {kind}", "1", f"{CUT:.0%} cut", share, samples=1))
            rows.write("vision_speed", table)


def _in_turn(models: dict[str, torch.nn.Module], pixels: torch.Tensor) -> dict[str, np.ndarray]:
    """Images per second of every repeat, one model after the other, after one repeat that warms up."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(1 + REPEATS):
        for name, model in models.items():
            start = now()
            model(pixels)
            if repeat:
                found[name].append(len(pixels) / (now() - start))
    return {name: np.array(each) for name, each in found.items()}


def _shares(model: torch.nn.Module, pixels: torch.Tensor) -> dict[str, float]:
    """Of the time inside operations, by kind."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        model(pixels)
    total: Counter[str] = Counter()
    for event in seen.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key in names), "element by element, and the scan")
        total[kind] += event.self_cpu_time_total
    return {kind: time / sum(total.values()) for kind, time in total.items()}


if __name__ == "__main__":
    main()
