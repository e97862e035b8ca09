"""Claim: the size of a token's step says which tokens a state-space model can do without; the published score says no more than chance.

    OMP_NUM_THREADS=1 python benchmarks/token_recall.py --seeds 0 1 2

Trains a small Mamba-2 to recall: 48 tokens of context hide four payload tokens among noise, then a query asks for them in order. Then tokens of the context
leave after the first two of three layers, by every kind of reduction and every score, and query and answers stay. Measures how many answers are right, the loss
on them, and how many of the payload tokens were still there in the last layer. Writes benchmarks/results/token_recall.csv; about two minutes a seed on one core.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Mamba2Config

import rows
from duramen.intervals import mean_interval
from duramen.ssm.mixer import ExactScans
from duramen.tokens.model import Reduced, Reduction

CONTEXT, PAYLOAD, QUERY = 48, 4, 12
STEPS, WARMUP, FLAT, BATCH, RATE = 1200, 100, 0.7, 32, 4e-3
SITES, CUT = (0, 1), 0.27
SUBJECTS: dict[str, dict[str, object]] = {
    "dense": {"cut": 0.0},
    **{f"utrc, {score}": {"kind": "utrc", "score": score} for score in ("delta", "write", "clip", "l2", "random")},
    **{f"prune, {score}": {"kind": "prune", "score": score} for score in ("delta", "write", "clip", "l2")},
    "utrc as published": {"kind": "utrc", "score": "clip", "merge_forward": False, "sizes": False, "window": None},
    "utrc, delta, bias, aligned": {"kind": "utrc", "score": "delta", "gap_step": "bias", "aligned": True},
    "tome": {"kind": "tome"},
    "random": {"kind": "random"},
    "truncate": {"kind": "truncate"},
}


def sequences(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [count, 52], answers [count, 4], and where the payload is [count, 4]."""
    tokens = torch.randint(8, 12, (count, CONTEXT), generator=draw)
    places = torch.stack([torch.randperm(CONTEXT, generator=draw)[:PAYLOAD].sort().values for _ in range(count)])
    payload = torch.randint(0, 4, (count, PAYLOAD), generator=draw)
    tokens.scatter_(1, places, payload)
    return torch.cat([tokens, torch.full((count, 1), QUERY), payload[:, :-1]], 1), payload, places


def trained(seed: int) -> nn.Module:
    """A model that recalls."""
    torch.manual_seed(seed)
    config = Mamba2Config(
        hidden_size=64, num_hidden_layers=3, num_heads=4, head_dim=32, state_size=32, n_groups=1, chunk_size=16, expand=2, vocab_size=16,
        tie_word_embeddings=False, pad_token_id=15, bos_token_id=14, eos_token_id=13,
    )  # fmt: skip
    network, draw = AutoModelForCausalLM.from_config(config), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.01)
    with ExactScans(network):
        for step in range(STEPS):
            falling = (STEPS - step) / ((1 - FLAT) * STEPS)
            optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / WARMUP, falling)
            tokens, answers, _ = sequences(BATCH, draw)
            logits = network(tokens, use_cache=False).logits[:, -PAYLOAD:]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
    return network.eval()


@torch.no_grad()
def measured(network: nn.Module, settings: dict[str, object]) -> dict[str, np.ndarray]:
    """Share of right answers, loss, and payload tokens that are left, per sequence."""
    tokens, answers, places = sequences(512, torch.Generator().manual_seed(12345))
    with Reduced(network, Reduction(**{"sites": SITES, "cut": CUT, "first": 0, "last": 1, **settings})) as reduced:
        reduced.protect = (torch.arange(tokens.shape[1]) >= CONTEXT).expand_as(tokens)
        logits = network(tokens, use_cache=False).logits[:, -PAYLOAD:]
        left = (reduced.prompt.positions[:, None] == places[..., None]).any(-1)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none").view_as(answers)
    right = logits.argmax(-1) == answers
    return {
        "accuracy": right.double().mean(1).numpy(),
        "loss": loss.double().mean(1).numpy(),
        "payload left": left.double().mean(1).numpy(),
    }


def main() -> None:
    """Trains and measures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    found: dict[str, list[dict[str, np.ndarray]]] = defaultdict(list)
    for seed in options.seeds:
        network = trained(seed)
        for subject, settings in SUBJECTS.items():
            found[subject].append(measured(network, settings))
            print(
                seed,
                subject,
                {metric: round(float(values.mean()), 4) for metric, values in found[subject][-1].items()},
                flush=True,
            )
    table, case = [], f"selective recall, {len(options.seeds)} models, 52 to 28 tokens, all"
    for subject, each in found.items():
        for metric in each[0]:
            figure = mean_interval(np.concatenate([one[metric] for one in each]))
            bounds = {"low": figure.low, "high": figure.high} if figure.low < figure.high else {}
            table.append(
                rows.row(
                    case, metric, "nats" if metric == "loss" else "1", subject, figure.value, samples=figure.samples, **bounds
                )
            )
            for seed, one in zip(options.seeds, each, strict=True):
                table.append(
                    rows.row(
                        case.replace(", all", f", seed {seed}"),
                        metric,
                        "nats" if metric == "loss" else "1",
                        subject,
                        float(one[metric].mean()),
                        samples=512,
                    )
                )
    rows.write("token_recall", table)


if __name__ == "__main__":
    main()
