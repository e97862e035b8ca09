"""Claim: the table of timed parts ranks networks on this machine as their own times do, with a correlation of at least 0.95.

    python benchmarks/vit_latency.py

Draws 20 networks out of the space of the recipe quasar, predicts the milliseconds of an image by parts in ONNX Runtime, and times each whole network; all in turns, in several rounds, of which the fastest counts.
Writes benchmarks/results/vit_latency.csv. A minute; nothing else should run.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from scipy.stats import spearmanr

import rows
from duramen.vision import ElasticViTForImageClassification
from duramen.vision.cpu import fastest, session
from duramen.vision.elastic import materialise
from duramen.vision.images import shapes
from duramen.vision.integers import INPUT, OUTPUT, graph_of
from duramen.vision.supernet import Settings, begin_rounding, new_config, space_of
from duramen.vision.vit_search import Settings as VitSettings
from duramen.vision.vit_search import target_of

NETWORKS = 20


def main() -> None:
    """Predicts and times."""
    torch.manual_seed(0)
    images = shapes(256, 28, channels=1)
    network = ElasticViTForImageClassification(new_config(Settings(), images)).eval()
    begin_rounding(network, images)
    space, generator = space_of(network), torch.Generator().manual_seed(0)
    drawn = [space.draw(generator) for _ in range(NETWORKS)]
    table = target_of(VitSettings(target=1, device="cpu"), network, space, lambda name, compute: compute())
    predicted = np.array([table.seconds(each.parts(network.config)) for each in drawn])
    x = np.random.default_rng(0).standard_normal((1, 1, 28, 28)).astype(np.float32)
    sessions = [session(graph_of(materialise(network, each), "onnx", 1)[0]) for each in drawn]
    timed = np.array(fastest([partial(each.run, [OUTPUT], {INPUT: x}) for each in sessions]))
    case = f"{NETWORKS} networks, {1000 * timed.min():.2f} to {1000 * timed.max():.2f} ms"
    apart = np.abs(predicted / timed - 1)
    figures = {
        "rank correlation": (spearmanr(predicted, timed).statistic, "1"),
        "median error": (float(np.median(apart)), "1"), "largest error": (float(apart.max()), "1"), "parts timed": (len(table.table), "1"),
    }  # fmt: skip
    found = [rows.row(case, metric, unit, "sum of parts", value, samples=NETWORKS) for metric, (value, unit) in figures.items()]
    for each in found:
        print(each["metric"], each["value"])
    rows.write("vit_latency", found)


if __name__ == "__main__":
    main()
