"""Claim: at every share of tokens cut, dropping those that write least to the state costs the least of what follows a prompt.

    python benchmarks/train_state_space.py mamba2-words out/mamba2-words --minutes 30 --length 512 --batch 8
    OMP_NUM_THREADS=1 python benchmarks/token_quality.py out/mamba2-words

Reads windows of text that the model has not seen: a context is shortened inside the model, and what follows it is scored. Every kind of reduction and every score, at 10 to 40 %
fewer tokens in the mean layer, at the published kind of sites; and the dense model with the end of the context alone, which says how much of a
context such a model uses at all. Measures nats per token above the dense model, paired window by window. Writes benchmarks/results/token_quality.csv; about
a quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import rows
from duramen.calibrate.tokens import evaluation_tokens
from duramen.intervals import mean_interval
from duramen.ssm.mixer import ExactScans
from duramen.tokens.model import Reduced, Reduction, continuation_losses

CUTS = (0.1, 0.2, 0.3, 0.4)
PUBLISHED = {"kind": "utrc", "score": "clip", "merge_forward": False, "sizes": False, "window": None, "first": 0, "last": 1}
SUBJECTS: dict[str, dict[str, object]] = {
    **{f"utrc, {score}": {"kind": "utrc", "score": score} for score in ("write", "delta", "clip", "l2", "random")},
    "utrc as published": PUBLISHED,
    **{f"prune, {score}": {"kind": "prune", "score": score} for score in ("write", "delta", "clip")},
    "tome": {"kind": "tome"},
    "random": {"kind": "random"},
    "truncate": {"kind": "truncate"},
    "utrc, write, stream merges": {"kind": "utrc", "prune_share": 1.0},
    "utrc, write, nothing merges": {"kind": "utrc", "prune_share": 1.0, "residual": "prune"},
    "utrc, write, aligned": {"kind": "utrc", "aligned": True},
    "utrc, write, bias": {"kind": "utrc", "gap_step": "bias"},
    "prune, write, aligned": {"kind": "prune", "aligned": True},
}
ENDS = (16, 64)
BATCH = 8


@torch.no_grad()
def dense_losses(network: nn.Module, windows: Tensor, start: int, context: int) -> np.ndarray:
    """Nats per token from ``start`` on, after so many tokens of context, for every window."""
    found = []
    with ExactScans(network):
        for part in torch.split(windows[:, start - context :], BATCH):
            logits = network(part, use_cache=False).logits[:, context - 1 : -1]
            loss = nn.functional.cross_entropy(logits.transpose(1, 2), part[:, context:], reduction="none")
            found.append(loss.double().mean(1))
    return torch.cat(found).numpy()


@torch.no_grad()
def reduced_losses(network: nn.Module, windows: Tensor, start: int, settings: dict[str, object]) -> np.ndarray:
    """The same after a context that is shortened."""
    with Reduced(network, Reduction(**settings)) as reduced:
        found = [continuation_losses(network, reduced, part, start) for part in torch.split(windows, BATCH)]
    return torch.cat(found).double().mean(1).numpy()


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", default="boolq")
    parser.add_argument("--windows", type=int, default=96)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--context", type=int, default=384)
    options = parser.parse_args()
    network = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows = evaluation_tokens(tokenizer, options.text, length=options.length, windows=options.windows)
    case = f"{options.model.name}, {options.text} {options.windows}x{options.length}, {options.context} of context"
    dense, table = dense_losses(network, windows, options.context, options.context), []

    def note(here: str, subject: str, losses: np.ndarray) -> None:
        above = mean_interval(losses - dense)
        bounds = {"low": above.low, "high": above.high}
        table.append(rows.row(here, "nats above dense", "nats", subject, above.value, samples=len(losses), **bounds))
        print(here, subject, f"{above.value:.4f} ({above.low:.4f} to {above.high:.4f})", flush=True)

    figure = mean_interval(dense)
    table.append(
        rows.row(
            f"{case}, dense",
            "nats per token",
            "nats",
            "dense",
            figure.value,
            samples=len(dense),
            low=figure.low,
            high=figure.high,
        )
    )
    print(table[-1]["value"], flush=True)
    for end in ENDS:
        note(f"{case}, dense", f"dense, the last {end} tokens alone", dense_losses(network, windows, options.context, end))
    for cut in CUTS:
        for subject, settings in SUBJECTS.items():
            note(f"{case}, {cut:.0%}", subject, reduced_losses(network, windows, options.context, {"cut": cut, **settings}))
    rows.write("token_quality", table)


if __name__ == "__main__":
    main()
