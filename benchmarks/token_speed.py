"""Claim: a prompt whose cost is cut by a share, as predicted from multiply-adds, takes so much less time.

    OMP_NUM_THREADS=1 python benchmarks/token_speed.py

Reads prompts with random weights of the shapes of Mamba-130m and Mamba2-130m (24 layers, width 768), dense on our scans and on those of transformers, and with
10, 20 and 30 % of the multiply-adds cut at the published kind of sites, by matching, and 30 % by pruning. All take turns; logits of the last token alone. Measures processor
seconds, the least of some repeats. Writes benchmarks/results/token_speed.csv; about half an hour on one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig

import rows
from duramen.families.model import BlockModel
from duramen.ssm.mixer import ExactScans
from duramen.tokens.cost import costs
from duramen.tokens.model import Kind, Reduced, Reduction
from duramen.tokens.schedule import solve_keep

SHARED = {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50280}
MODELS = {
    "Mamba-130m": MambaConfig(**SHARED),
    "Mamba2-130m": Mamba2Config(**SHARED, num_heads=24, head_dim=64, n_groups=1, state_size=128),
}
SITES = tuple(range(6, 17, 5))
WAYS = {f"{kind}, {cut:.0%} cut": (kind, cut) for kind, cut in (("utrc", 0.1), ("utrc", 0.2), ("utrc", 0.3), ("prune", 0.3))}
DENSE = "dense"
REPEATS = 2


def reduction(network: nn.Module, kind: Kind, cut: float, length: int) -> Reduction:
    """What cuts so much of the multiply-adds of a prompt of this length."""
    prompt = costs("macs", BlockModel.of(network), length, matches=kind == "utrc", window=2048)
    keep = solve_keep(prompt, SITES, cut, tokens=length)
    return Reduction(kind=kind, sites=SITES, keep=(keep,) * len(SITES))


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", nargs="*", type=int, default=[2048, 8192])
    options = parser.parse_args()
    table = []
    for name, config in MODELS.items():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config).eval()
        for length in options.lengths:
            ways: dict[str, Callable[[], AbstractContextManager[object]]] = {
                DENSE: partial(ExactScans, network),
                "transformers, dense": nullcontext,
                **{way: partial(Reduced, network, reduction(network, *what, length)) for way, what in WAYS.items()},
            }
            for way, seconds in timed(network, ways, length).items():
                compared = {} if way == DENSE else {"peer": DENSE, "peer_value": seconds[1]}
                case, metric = f"{name}, {length} tokens", "processor seconds of a prompt"
                table.append(rows.row(case, metric, "s", way, seconds[0], samples=REPEATS, **compared))
                print(case, way, f"{seconds[0]:.2f} s, {seconds[1] / seconds[0]:.2f} times as fast as dense", flush=True)
            rows.write("token_speed", table)


@torch.no_grad()
def timed(
    network: nn.Module, ways: dict[str, Callable[[], AbstractContextManager[object]]], length: int
) -> dict[str, tuple[float, float]]:
    """The least seconds of a prompt by every way, and by the dense one."""
    tokens = torch.randint(0, network.config.vocab_size, (1, length))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(REPEATS):
        for way, context in ways.items():
            with context():
                start = time.process_time()
                network(tokens, use_cache=False, logits_to_keep=1)
                seconds[way].append(time.process_time() - start)
    return {way: (min(found), min(seconds[DENSE])) for way, found in seconds.items()}


if __name__ == "__main__":
    main()
