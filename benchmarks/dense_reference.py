"""Claim: the evaluator is right before anything is compared: it finds what others measured on the same dense weights.

    python benchmarks/dense_reference.py --text wiki.test.raw

Perplexity of SmolLM2-135M (the embedded weights) on the whole WikiText-2-raw test at 2,048 tokens, and zero-shot accuracies on the first 200
documents. The peer values were measured independently by plain transformers on the same weights. Writes
benchmarks/results/dense_reference.csv. About 20 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer

import rows
from duramen.assets import open_model
from duramen.calibrate.tokens import evaluation_tokens
from duramen.evaluate.likelihood import grade, load_requests, score_requests
from duramen.evaluate.perplexity import final_hidden, perplexity, token_losses
from duramen.families.model import BlockModel
from duramen.hardware.machine import forward_dtype
from duramen.intervals import wilson_interval
from wikitext import literature

PERPLEXITY = 21.62
ACCURACY = {
    "piqa": (0.655, 0.66),
    "arc_easy": (0.495, 0.36),
    "hellaswag": (0.40, 0.47),
    "sciq": (0.725, 0.705),
    "lambada": (0.33, 0.33),
}
PEER = "plain transformers"


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", required=True)
    parser.add_argument("--documents", type=int, default=200)
    options = parser.parse_args()
    folder = open_model("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, table = BlockModel.from_folder(folder, dtype=forward_dtype("auto")), []

    def add(case: str, metric: str, figure: object, peer: float) -> None:
        interval = {"low": figure.low, "high": figure.high, "samples": figure.samples}  # type: ignore[attr-defined]
        value = figure.value  # type: ignore[attr-defined]
        table.append(
            rows.row(f"SmolLM2-135M, dense, {case}", metric, "1", "duramen", value, **interval, peer=PEER, peer_value=peer)
        )
        table.append(rows.row(f"SmolLM2-135M, dense, {case}", metric, "1", PEER, peer))
        rows.write("dense_reference", table)
        print(case, metric, value, peer, flush=True)

    windows = evaluation_tokens(tokenizer, literature(options.text), length=2048, windows=None)
    losses = torch.cat([token_losses(model, final_hidden(model, part), part) for part in windows.split(16)])
    add(f"{Path(options.text).name} {len(windows)}x2048", "perplexity", perplexity(losses.mean(1).double().numpy()), PERPLEXITY)

    for task, peers in ACCURACY.items():
        requests = load_requests(task, tokenizer, options.documents)
        grades = grade(requests, score_requests(model, requests))
        add(task, "accuracy", wilson_interval(grades.acc), peers[0])
        if task != "lambada":
            add(task, "accuracy per character", wilson_interval(grades.acc_norm), peers[1])


if __name__ == "__main__":
    main()
