"""Claim: fewer tokens inside the model are fewer seconds of a prompt, nearly as many fewer as tokens.

    OMP_NUM_THREADS=1 python benchmarks/token_speed.py

Reads prompts with random weights of the shapes of Mamba-130m and Mamba2-130m (24 layers, width 768), dense on our scans and on those of transformers, and with
10, 20 and 30 % fewer tokens in the mean layer at the published kind of sites, by matching and by pruning. All take turns; logits of the last token alone. Measures processor
seconds, the least of some repeats, and the share of the dense ones. Writes benchmarks/results/token_speed.csv; about a quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig

import rows
from duramen.ssm.mixer import ExactScans
from duramen.tokens.model import Reduced, Reduction

SHARED = {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50280}
MODELS = {
    "Mamba-130m": MambaConfig(**SHARED),
    "Mamba2-130m": Mamba2Config(**SHARED, num_heads=24, head_dim=64, n_groups=1, state_size=128),
}
SITES = tuple(range(6, 17, 5))
CUTS = (0.1, 0.2, 0.3)
DENSE = "dense"
REPEATS = 3


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", nargs="*", type=int, default=[1024, 2048])
    options = parser.parse_args()
    table = []
    for name, config in MODELS.items():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config).eval()
        ways: dict[str, Callable[[], AbstractContextManager[object]]] = {
            DENSE: partial(ExactScans, network),
            "transformers, dense": nullcontext,
            **{
                f"{kind}, {cut:.0%} fewer": partial(Reduced, network, Reduction(kind=kind, cut=cut, sites=SITES))
                for cut in CUTS
                for kind in ("utrc", "prune")
            },
        }
        for length in options.lengths:
            tokens = torch.randint(0, config.vocab_size, (1, length))
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(REPEATS + 1):
                for way, context in ways.items():
                    with torch.no_grad(), context():
                        start = time.process_time()
                        network(tokens, use_cache=False, logits_to_keep=1)
                        seconds[way].append(time.process_time() - start)
            for way, found in seconds.items():
                value, dense = min(found[1:]), min(seconds[DENSE][1:])
                compared = {} if way == DENSE else {"peer": DENSE, "peer_value": dense}
                table.append(
                    rows.row(
                        f"{name}, {length} tokens",
                        "processor seconds of a prompt",
                        "s",
                        way,
                        value,
                        samples=REPEATS,
                        **compared,
                    )
                )
                print(name, length, way, round(value, 3), "share", round(value / dense, 3), flush=True)
    rows.write("token_speed", table)


if __name__ == "__main__":
    main()
