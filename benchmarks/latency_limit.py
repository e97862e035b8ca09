"""Claim: a sub-network that is thought to take 0.7 of a prefill's time takes it, within 5 %.

    python benchmarks/latency_limit.py

Times every level of SmolLM2-135M's modules, brings four candidates inside 0.7 of the dense prefill of 256 tokens (the same share everywhere, and
three from random levels), and times each as a whole model. Writes benchmarks/results/latency_limit.csv. Three minutes on 2 cores; leave the
machine idle.
"""

from __future__ import annotations

import random
from dataclasses import replace

import torch

import rows
from duramen.assets import open_model
from duramen.families.model import BlockModel
from duramen.search.constraints import limits, repair
from duramen.search.database import plan_of
from duramen.search.evolution import Settings, chosen_modules
from duramen.search.latency import TURNS, prefill_costs, prefills
from duramen.shrink.plan import Plan, digest
from duramen.shrink.surgery import Surgery

TARGET = 0.7


def main() -> None:
    """Runs the table."""
    table = []
    for dtype in (torch.bfloat16, torch.float32):
        model = BlockModel.from_folder(open_model("smollm2-135m"), dtype=dtype)
        settings = Settings(target={"latency": TARGET})
        modules = [replace(m, order=tuple(range(m.units.count))) for m in chosen_modules(model, settings)]
        costs = prefill_costs(model, modules)
        (limit,) = limits(model, modules, settings.target, bits=16, memo=lambda name, compute, costs=costs: costs)  # type: ignore[misc]
        losses = [[1 - kept / module.units.count for kept in module.grid] for module in modules]
        genomes = {"uniform": tuple(module.nearest(TARGET) for module in modules)}
        for seed in range(3):
            draw = random.Random(seed)
            genomes[f"random {seed}"] = tuple(draw.randrange(len(module.grid)) for module in modules)
        genomes = {name: repair(genome, [limit], losses, modules) for name, genome in genomes.items()}
        dense = Surgery(model, Plan(digest(model), len(model.blocks)))
        measured = prefills({"dense": dense} | {n: Surgery(model, plan_of(model, modules, g, {})) for n, g in genomes.items()})
        case = f"SmolLM2-135M, prefill of 256 tokens, at most {TARGET:g} of the dense, {str(dtype).removeprefix('torch.')}"
        for name, thought in {"dense": limit.whole, **{name: limit.cost(genome) for name, genome in genomes.items()}}.items():
            table.append(rows.row(case, "predicted", "ms", name, thought, samples=1))
            table.append(
                rows.row(case, "measured", "ms", name, measured[name], samples=TURNS, peer="predicted", peer_value=thought)
            )
            share = {"peer": "target", "peer_value": TARGET}
            if name != "dense":
                table.append(
                    rows.row(
                        case,
                        "share of the dense, measured",
                        "1",
                        name,
                        measured[name] / measured["dense"],
                        samples=TURNS,
                        **share,
                    )
                )
        print(case, measured, limit.most, costs["spread"], flush=True)
        rows.write("latency_limit", table)


if __name__ == "__main__":
    main()
