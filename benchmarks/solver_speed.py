"""Claim: choosing and solving a layer with `effort: fast` takes at most 1.5 times as long as SparseGPT's recursion.

    python benchmarks/solver_speed.py

Layers of Llama-7B's shapes with random weights and the Gram of random, correlated, badly scaled inputs, at 50 %, damping 0.01,
float32; SparseGPT and the three efforts one after another in one process, from the Gram on (factorisation included). Writes
benchmarks/results/solver_speed.csv. About 40 minutes on 2 cores, nearly all of it for `good` and `best`.
"""

from __future__ import annotations

import argparse
import time

import torch

import rows
from duramen.prune import multiweight, sparsegpt

SHAPES = {"4096x4096": (4096, 4096), "11008x4096": (11008, 4096)}
SUBJECTS = {
    "sparsegpt": lambda weight, gram: sparsegpt.prune(weight, gram, sparsity=0.5, damping=0.01),
    **{
        f"multiweight {effort}": lambda weight, gram, effort=effort: multiweight.prune(
            weight, gram, sparsity=0.5, damping=0.01, effort=effort
        )
        for effort in ("fast", "good", "best")
    },
}


def layer(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random weight [O, I] and the Gram [I, I] of 2·I random tokens, mixed and with log-normal scales."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * inputs, inputs, generator=generator) * torch.randn(inputs, generator=generator).exp()
    x = 0.5 * x + x @ torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    return 0.02 * torch.randn(outputs, inputs, generator=generator), x.T @ x


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--subjects", nargs="*", default=list(SUBJECTS))
    options = parser.parse_args()
    table = rows.read("solver_speed")
    for shape in options.shapes:
        weight, gram = layer(*SHAPES[shape])
        case, peer = f"{shape}, 50%", {}
        table = [row for row in table if row["case"] != case or row["subject"] not in options.subjects]
        for subject in options.subjects:
            start = time.perf_counter()
            found = SUBJECTS[subject](weight, gram)
            figures = {"seconds": time.perf_counter() - start, "error": found.error}
            peer = peer or figures
            for metric, value in figures.items():
                more = {} if subject == "sparsegpt" else {"peer": "sparsegpt", "peer_value": peer[metric]}
                table.append(rows.row(case, metric, "s" if metric == "seconds" else "1", subject, value, samples=1, **more))
            rows.write("solver_speed", table)
            print(case, subject, figures, flush=True)


if __name__ == "__main__":
    main()
