"""Claim: the exact scans are several times as fast on a processor as those of transformers, forwards and in training.

    OMP_NUM_THREADS=1 python benchmarks/scan_speed.py

Runs a layer's scan, and four whole blocks, at the shapes of the published models' smallest ones, in float32 on the same random inputs, by Duramen and by plain transformers, in
turns. Measures processor seconds (the least of some repeats), forwards and with gradients of all inputs, and how far the outputs differ. Writes
benchmarks/results/scan_speed.csv. About five minutes on one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus
from transformers import AutoModel, Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

import rows
from duramen.ssm.mixer import ExactScans
from duramen.ssm.selective import selective_scan
from duramen.ssm.ssd import ssd_scan

LENGTHS = (256, 1024, 4096)
REPEATS = 3
Scan = Callable[..., Tensor]


def selective(length: int) -> tuple[list[Tensor], dict[str, Scan]]:
    """Mamba-130m: 1536 channels, 16 states."""
    draw = torch.Generator().manual_seed(0)
    x, steps = torch.randn(1, length, 1536, generator=draw), softplus(torch.randn(1, length, 1536, generator=draw) - 3)
    a, b, c = -torch.rand(1536, 16, generator=draw) * 4, *torch.randn(2, 1, length, 16, generator=draw)

    def theirs(x: Tensor, steps: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return mamba_selective_scan(
            *(each.transpose(1, 2) for each in (x, steps)), a, b.transpose(1, 2), c.transpose(1, 2)
        ).transpose(1, 2)

    return [x, steps, a, b, c], {"duramen": lambda x, s, a, b, c: selective_scan(x, s, s, a, b, c)[0], "transformers": theirs}


def ssd(length: int) -> tuple[list[Tensor], dict[str, Scan]]:
    """Mamba2-130m: 24 heads of 64, 128 states, chunks of 256 by transformers' default."""
    draw = torch.Generator().manual_seed(0)
    x, steps = torch.randn(1, length, 24, 64, generator=draw), softplus(torch.randn(1, length, 24, generator=draw) - 3)
    a, b, c = -torch.rand(24, generator=draw) * 4, *torch.randn(2, 1, length, 1, 128, generator=draw)

    def theirs(x: Tensor, steps: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        found = mamba2_chunk_scan(x, steps, a, b, c, chunk_size=256)
        return found[0] if isinstance(found, tuple) else found

    return [x, steps, a, b, c], {"duramen": lambda x, s, a, b, c: ssd_scan(x, s, s, a, b, c)[0], "transformers": theirs}


def blocks(config: Any) -> Callable[[int], tuple[list[Tensor], dict[str, Scan]]]:
    """Four blocks of a model's shape, from embeddings to the norm after the last."""

    def make(length: int) -> tuple[list[Tensor], dict[str, Scan]]:
        torch.manual_seed(0)
        network = AutoModel.from_config(config)

        def exact(x: Tensor) -> Tensor:
            with ExactScans(network):
                return network(inputs_embeds=x, use_cache=False).last_hidden_state

        stock = lambda x: network(inputs_embeds=x, use_cache=False).last_hidden_state  # noqa: E731
        return [torch.randn(1, length, config.hidden_size)], {"duramen": exact, "transformers": stock}

    return make


SHARED = {"hidden_size": 768, "num_hidden_layers": 4, "vocab_size": 256}
CASES = {
    "Mamba": selective,
    "Mamba-2": ssd,
    "4 Mamba blocks": blocks(MambaConfig(**SHARED)),
    "4 Mamba-2 blocks": blocks(Mamba2Config(**SHARED, num_heads=24, head_dim=64, n_groups=1, state_size=128)),
}


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--lengths", nargs="*", type=int, default=list(LENGTHS))
    options = parser.parse_args()
    wanted = {f"{name}, {length} steps" for name in options.cases for length in options.lengths}
    table = [row for row in rows.read("scan_speed") if row["case"] not in wanted]
    for name, make in CASES.items():
        for length in options.lengths if name in options.cases else ():
            inputs, scans = make(length)
            for metric, run in (("processor seconds", forward), ("processor seconds with gradients", backward)):
                if run is backward and length == max(LENGTHS):
                    continue
                found: dict[str, list[float]] = {subject: [] for subject in scans}
                outputs = {}
                for _ in range(REPEATS + 1):
                    for subject, scan in scans.items():
                        start = time.process_time()
                        outputs[subject] = run(scan, inputs)
                        found[subject].append(time.process_time() - start)
                peer = min(found["transformers"][1:])
                for subject, seconds in found.items():
                    compared = {"peer": "transformers", "peer_value": peer} if subject == "duramen" else {}
                    table.append(
                        rows.row(f"{name}, {length} steps", metric, "s", subject, min(seconds[1:]), samples=REPEATS, **compared)
                    )
                print(
                    name,
                    length,
                    metric,
                    {subject: round(min(seconds[1:]), 4) for subject, seconds in found.items()},
                    flush=True,
                )
                if run is forward:
                    apart = outputs["duramen"] - outputs["transformers"]
                    share = float(apart.abs().max() / outputs["transformers"].abs().max())
                    table.append(
                        rows.row(f"{name}, {length} steps", "largest relative difference", "1", "duramen", share, samples=1)
                    )
                    print("apart", share)
    rows.write("scan_speed", table)


@torch.no_grad()
def forward(scan: Scan, inputs: list[Tensor]) -> Tensor:
    """Outputs alone."""
    return scan(*inputs)


def backward(scan: Scan, inputs: list[Tensor]) -> Tensor:
    """Outputs and the gradients of everything."""
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    outputs = scan(*leaves)
    outputs.square().sum().backward()
    return outputs


if __name__ == "__main__":
    main()
