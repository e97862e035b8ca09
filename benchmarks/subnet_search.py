"""Claim: levels that are repaired already, exchanged inside the budget, lead to a nearer sub-network than masks that are repaired at the end.

    python benchmarks/subnet_search.py --text wiki.test.raw
    python benchmarks/subnet_search.py --text wiki.test.raw --targets 80% --subjects search "search_masks"

Keeps a share of the block parameters of SmolLM2-135M by the same share everywhere, by fusion (the default of the structured methods),
by the published search as repaired (``search_masks``, with more candidate tokens than ours at most needs), by the best sum of what modules
lose alone (``knapsack``), and by ``search``; all repaired by the same defaults on the same calibration tokens. The levels are built once a
target. Measures perplexity and KL from dense, the paired difference of the KL from that of ``search``, candidate tokens and processor
seconds. Adds to benchmarks/results/subnet_search.csv after every run, and the KL of every window to subnet_search.json; what stands there
is left out. About five hours on one core.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import rows
from duramen.calibrate.walker import Walk
from duramen.evaluate.perplexity import divergence, final_hidden, perplexity
from duramen.families.model import BlockModel
from duramen.hardware.machine import fastest_device, forward_dtype
from duramen.intervals import mean_interval
from duramen.registry import get_method
from duramen.shrink.plan import Plan
from duramen.shrink.surgery import masked
from pruning_quality import Bench, arguments, exactly
from structured_quality import Edited, Kept

TARGETS = ("90%", "80%", "70%", "60%", "50%")
DEFAULT = "search"
SUBJECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "search": ("search", {}),
    "uniform": ("search", {"start": "uniform", "generations": 0}),
    "knapsack": ("search", {"start": "knapsack", "generations": 0}),
    "fusion": ("fusion", {}),
    "search_masks": ("search_masks", {"epochs": 10, "population": 24, "mutants": 12, "crossovers": 7, "parents": 5, "fitness_tokens": 2048}),
}  # fmt: skip
UNITS = {
    "perplexity": "1", "KL from dense": "nats", "KL above search": "nats", "block parameters": "1", "candidate tokens": "1",
    "processor seconds": "s",
}  # fmt: skip
SHARED = ("alone", "starts")
"""What all subjects of a target that begin from the same levels have in common."""


def main() -> None:
    """Runs the table."""
    options = arguments(TARGETS, SUBJECTS).parse_args()
    bench = Bench.open(options)
    case = f"{options.model}, {bench.tokens.numel()} tokens, {Path(options.text).name} {options.windows}x{options.window}"
    for target in options.targets:
        with TemporaryDirectory() as place:
            memory: dict[str, Any] = {}
            for subject in options.subjects:
                measure(bench, f"{case}, {target}", subject, Path(place), memory)


def measure(bench: Bench, case: str, subject: str, place: Path, memory: dict[str, Any]) -> None:
    """One subject at one target, unless it stands in the table."""
    table = rows.read("subnet_search")
    if any((row["case"], row["subject"]) == (case, subject) for row in table):
        return
    share = float(case.rpartition(", ")[2].removesuffix("%")) / 100
    name, settings = SUBJECTS[subject]
    wanted = (
        {"target": {"block_parameters": share}} if name != "fusion" else {"ratio": 1 - share, "ratio_of": "block_parameters"}
    )
    model, store = BlockModel.from_folder(bench.folder, dtype=forward_dtype("auto"), device=fastest_device()), Kept()

    def memo(key: str, compute: Callable[[], Any]) -> Any:
        if key not in SHARED:
            return compute()
        if key not in memory:
            memory[key] = compute()
        return memory[key]

    walk, start = Walk(store=store, memo=memo, folder=place / "levels"), time.process_time()
    get_method(name).apply(model, bench.tokens, walk=walk, **settings, **wanted)
    seconds, plan = time.process_time() - start, walk.reshape.plan
    edited = Edited.beside(bench.folder, store)
    with masked(edited, Plan(plan.base, plan.blocks, skipped=plan.skipped, dropped=plan.dropped)):
        hidden = final_hidden(edited, bench.windows)
        found = divergence(bench.dense, bench.hidden, edited, hidden, bench.windows)
    outside = sum(p.numel() for n, p in edited.network.named_parameters() if not n.startswith(f"{edited.family.blocks}."))
    figures = {
        "perplexity": perplexity(found.loss),
        "KL from dense": mean_interval(found.kl),
        "block parameters": exactly(walk.reshape.summary["parameters"]["after"] - outside),
        "candidate tokens": exactly(plan.made_by.get("tokens", 0)),
        "processor seconds": exactly(seconds),
    }
    windows = rows.keep_windows("subnet_search", case, subject, found.kl.tolist())
    if DEFAULT in windows and subject != DEFAULT:
        figures["KL above search"] = mean_interval(np.array(windows[subject]) - np.array(windows[DEFAULT]))
    for metric, figure in figures.items():
        bounds = {"low": figure.low, "high": figure.high} if figure.low < figure.high else {}
        table.append(rows.row(case, metric, UNITS[metric], subject, figure.value, samples=figure.samples, **bounds))
    rows.write("subnet_search", table)
    print(case.rpartition(", ")[2], subject, {name: round(figure.value, 4) for name, figure in figures.items()}, flush=True)


if __name__ == "__main__":
    main()
