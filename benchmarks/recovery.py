"""Claim: an exact refit and then low-rank adapters win back most of what compression took; a higher rank helps RoRA more than LoRA.

    python benchmarks/recovery.py --text wiki.test.raw
    python benchmarks/recovery.py --text wiki.test.raw --workers 6        # that share one GPU

Compresses a model to every base, refits it, and trains adapters on both: LoRA, RoRA and DoRA on the text alone, RoRA and refit + RoRA
on the text and the dense model's distributions; ranks are compared on the first base, the others at rank 32. Every one sees the same sequences in the same
order. The rate of each is the best of one grid by the held-out loss of seed 0; then come the other seeds. ``equal time`` trains as many steps as fit
into the time of LoRA's, by the seconds of a step measured alone before. Every run goes to benchmarks/results/recovery.json, with loss and KL
of every window; what stands there is left out. benchmarks/results/recovery.csv is made from it: means over seeds, intervals over
windows, and the spread of the seeds. About nine hours on one core.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import duramen
import rows
from duramen.assets import open_model
from duramen.calibrate.tokens import calibration_tokens, evaluation_tokens
from duramen.calibrate.walker import set_aside
from duramen.evaluate.perplexity import divergence, final_hidden, perplexity
from duramen.families.model import BlockModel
from duramen.hardware.clock import now
from duramen.hardware.machine import fastest_device, forward_dtype
from duramen.intervals import mean_interval
from duramen.recover.rora import Settings, adapted, groups
from duramen.rundir import write_json
from duramen.train.data import Rows
from duramen.train.loop import train
from duramen.train.models import Course
from duramen.train.objective import NextTokens
from pruning_quality import CORPORA
from wikitext import literature

BASES = {
    "2:4": {"method": "wanda", "pattern": "2:4"},
    "50%": {"method": "wanda", "sparsity": 0.5},
    "20% structured": {
        "method": "fusion", "ratio": 0.2, "ratio_of": "block_parameters", "allocation": "local", "repair": "none",
        "families": ["ffn_channel"],
    },
}  # fmt: skip
SUBJECTS: dict[str, dict[str, Any]] = {
    "LoRA": {"scaling": "alpha_over_r", "objective": "ce"},
    "RoRA": {"objective": "ce"},
    "refit + RoRA": {"objective": "distill"},
    "RoRA distilled": {"objective": "distill"},
    "DoRA": {"scaling": "alpha_over_r", "objective": "ce", "dora": True},
}
EVERY_RANK = ("LoRA", "RoRA", "refit + RoRA")
RANKS, MIDDLE = (8, 32, 128), 32
RATES = (2e-4, 6e-4, 2e-3, 6e-3)
SEEDS = (0, 1, 2)
STEPS, LONG, BATCH, LENGTH = 60, 240, 4, 128
PEER = "LoRA"
RUNS = rows.RESULTS / "recovery.json"
Cell = dict[str, Any]
UNTOLD = ("loss", "kl", "curve", "machine")
"""What of a run is kept and not printed."""


def main() -> None:
    """Runs what is missing, and writes the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", required=True, help="evaluation text")
    parser.add_argument("--calibration", nargs="*", default=list(CORPORA))
    parser.add_argument("--bases", nargs="*", default=list(BASES))
    parser.add_argument("--workers", type=int, default=1, help="processes that share the machine")
    parser.add_argument("--minutes", type=float, default=1e9, help="no cell begins after that")
    parser.add_argument("--work", type=Path, default=Path("out/recovery"), help="folder for the compressed models")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    folders = compressed(options)
    setup = {**vars(options), "work": str(options.work), "folders": folders}
    runs = json.loads(RUNS.read_text(encoding="utf-8")) if RUNS.is_file() else []
    keep = Keeper(runs)
    for base in options.bases:
        for subject in ("pruned", "refit"):
            if keep.wants({"base": base, "subject": subject}):
                keep({"base": base, "subject": subject} | judged(setup, base, subject))
    if not any(run["subject"] == "step" for run in runs):
        for name in SUBJECTS:
            keep(
                {
                    "base": options.bases[0],
                    "subject": "step",
                    "of": name,
                    "seconds": step_seconds(setup, name),
                    "machine": rows.machine(),
                }
            )
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for cells in stages(options.bases, keep):
            waiting = {pool.submit(run_cell, setup, cell, end): cell for cell in cells if keep.wants(cell)}
            for done in as_completed(waiting):
                if (found := done.result()) is not None:
                    keep(waiting[done] | found)
    tabulate(runs)


class Keeper:
    """Keeps every run as it is finished."""

    def __init__(self, runs: list[Cell]) -> None:
        self.runs = runs

    def wants(self, cell: Cell) -> bool:
        """Whether a cell is not there yet."""
        return not any(all(run.get(key) == value for key, value in cell.items()) for run in self.runs)

    def __call__(self, run: Cell) -> None:
        self.runs.append(run)
        write_json(RUNS, self.runs)
        print(
            {key: round(value, 4) if isinstance(value, float) else value for key, value in run.items() if key not in UNTOLD},
            flush=True,
        )


def stages(bases: list[str], keep: Keeper) -> Iterator[list[Cell]]:
    """The cells: all rates with seed 0, then the best rate of each with the other seeds, at equal time, and for longer."""
    kinds = [
        {"base": base, "subject": subject, "rank": rank}
        for base in bases
        for subject in SUBJECTS
        for rank in (RANKS if subject in EVERY_RANK and base == bases[0] else (MIDDLE,))
    ]
    yield [kind | {"rate": rate, "seed": 0, "steps": STEPS} for kind in kinds for rate in RATES]
    chosen = [kind | {"rate": best} for kind in kinds if (best := best_rate(keep.runs, kind)) is not None]
    more = [cell | {"seed": seed, "steps": STEPS} for cell in chosen for seed in SEEDS[1:]]
    seconds = {run["of"]: run["seconds"] for run in keep.runs if run["subject"] == "step"}
    equal = [
        cell | {"seed": seed, "steps": steps}
        for cell in chosen
        if cell["rank"] == MIDDLE
        and cell["base"] == bases[0]
        and (steps := round(STEPS * seconds[PEER] / seconds[cell["subject"]])) != STEPS
        and cell["subject"] != "RoRA"
        for seed in SEEDS
    ]
    long = [
        cell | {"seed": 0, "steps": LONG} for cell in chosen if cell["rank"] == MIDDLE and cell["subject"] == "refit + RoRA"
    ]
    yield long + more + equal


def best_rate(runs: list[Cell], kind: Cell) -> float | None:
    """The rate of least held-out loss, once all are there."""
    found = [run for run in runs if all(run.get(key) == value for key, value in (kind | {"seed": 0, "steps": STEPS}).items())]
    return min(found, key=lambda run: run["held_out"])["rate"] if len({run["rate"] for run in found}) == len(RATES) else None


def compressed(options: argparse.Namespace) -> dict[str, str]:
    """Folders of the dense model and, per base, of the pruned and the refitted one."""
    folders = {"dense": str(open_model(options.model))}
    for base in options.bases:
        for name, steps in (("pruned", [BASES[base]]), ("refit", [BASES[base], {"method": "refit"}])):
            out = options.work / f"{base} {name}".replace(" ", "-").replace("%", "").replace(":", "-")
            recipe = {
                "name": name,
                "calibration": {"text": options.calibration, "sequences": 64, "length": 512},
                "steps": steps,
            }
            duramen.run(recipe, options.model, out)
            folders[f"{base} {name}"] = str(out)
    return folders


class Judge:
    """What all cells of a process share: the dense model in float32 and what it says of the windows, the tokens to learn, and the compressed models."""

    def __init__(self, setup: Cell) -> None:
        self.setup, self.device = setup, fastest_device()
        tokenizer = AutoTokenizer.from_pretrained(setup["folders"]["dense"])
        self.windows = evaluation_tokens(tokenizer, literature(setup["text"]), length=1024, windows=10)
        self.tokens = calibration_tokens(tokenizer, setup["calibration"], sequences=512, length=LENGTH, seed=1).to(self.device)
        self.dense = self.opened("dense", torch.float32)
        self.hidden = final_hidden(self.dense, self.windows)

    @cache  # noqa: B019
    def opened(self, name: str, dtype: torch.dtype) -> BlockModel:
        """A model in memory."""
        network = AutoModelForCausalLM.from_pretrained(self.setup["folders"][name], dtype=dtype)
        return BlockModel.from_module(network.to(self.device))

    def figures(self, model: BlockModel) -> dict[str, list[float]]:
        """Loss and KL from dense of every window."""
        found = divergence(self.dense, self.hidden, model, final_hidden(model, self.windows), self.windows)
        return {"loss": found.loss.tolist(), "kl": found.kl.tolist()}


@cache
def _judge(setup: str) -> Judge:
    return Judge(json.loads(setup))


def judge_of(setup: Cell) -> Judge:
    """One in every process."""
    return _judge(json.dumps(setup))


def judged(setup: Cell, base: str, subject: str) -> Cell:
    """Figures of a compressed model as it is."""
    judge = judge_of(setup)
    return judge.figures(judge.opened(f"{base} {subject}", torch.float32)) | {"machine": rows.machine()}


def start_of(cell: Cell) -> str:
    """The model that a cell's adapters are trained on."""
    return f"{cell['base']} {'refit' if cell['subject'].startswith('refit') else 'pruned'}"


def text_of(judge: Judge, cell: Cell, settings: Settings) -> tuple[nn.Module, BlockModel, NextTokens]:
    """The student, and what it learns."""
    dtype = forward_dtype("auto")
    model, rows_of = judge.opened(start_of(cell), dtype), Rows.whole(judge.tokens)
    aside = set_aside(len(rows_of), settings.held_out, "held_out").to(judge.device)
    teacher = judge.opened("dense", dtype).network if settings.objective == "distill" else None
    return (
        model.network,
        model,
        NextTokens(Course(model.network, teacher, rows_of[~aside], rows_of[aside]), settings.distill_weight),
    )


def settings_of(cell: Cell) -> Settings:
    """Settings of the step ``rora``."""
    own = {"rank": cell["rank"], "learning_rate": cell["rate"], "seed": cell["seed"], "steps": cell["steps"]}
    return Settings(**own, **SUBJECTS[cell["subject"]], batch=BATCH, at_once=BATCH, every=20)


def run_cell(setup: Cell, cell: Cell, end: float) -> Cell | None:
    """Trains one cell; the adapters are merged into float32 weights, and those are measured."""
    if time.monotonic() > end:
        return None
    judge, settings = judge_of(setup), settings_of(cell)
    network, model, text = text_of(judge, cell, settings)
    start = now()
    with adapted(network, model, settings) as adapters:
        history = train(groups(adapters, settings), text, settings.schedule)
        seconds = now() - start
        return merged_figures(judge, cell, adapters) | {
            "held_out": min(loss for _, loss in history.held_out), "curve": history.held_out, "best": history.best,
            "seconds": seconds, "machine": rows.machine(),
        }  # fmt: skip


@torch.no_grad()
def merged_figures(judge: Judge, cell: Cell, adapters: dict[str, Any]) -> Cell:
    """Figures of the base with the adapters merged."""
    model, before = judge.opened(start_of(cell), torch.float32), {}
    for name, adapter in adapters.items():
        parameter = model.network.get_parameter(f"{name}.weight")
        before[name] = parameter.clone()
        parameter.copy_(adapter.merged(before[name]))
        assert not parameter[before[name] == 0].any() or adapter.mode == "side"
    found = judge.figures(model)
    for name, weight in before.items():
        model.network.get_parameter(f"{name}.weight").copy_(weight)
    return found


def step_seconds(setup: Cell, subject: str) -> float:
    """Of one training step at rank 32 on the first base, alone on the machine: the median of ten."""
    cell = {"base": setup["bases"][0], "subject": subject, "rank": MIDDLE, "rate": 1e-4, "seed": 0, "steps": 12}
    judge, settings = judge_of(setup), settings_of(cell)
    network, model, text = text_of(judge, cell, settings)
    times: list[float] = []
    with adapted(network, model, settings) as adapters:
        loss = text.loss

        def timed(indices: Any) -> torch.Tensor:
            times.append(now())
            return loss(indices)

        text.loss = timed  # type: ignore[method-assign]
        text.held_out = lambda: {"loss": 1.0}  # type: ignore[method-assign]
        train(groups(adapters, settings), text, settings.schedule)
    return float(np.median(np.diff(times)[1:]))


def tabulate(runs: list[Cell]) -> None:
    """The table: means over the seeds of every cell at its best rate."""
    cells: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for run in runs:
        if run["subject"] in ("pruned", "refit"):
            cells[run["base"], run["subject"]].append(run)
        elif run["subject"] != "step" and run["rate"] == best_rate(
            runs, {key: run[key] for key in ("base", "subject", "rank")}
        ):
            length = "" if run["steps"] == STEPS else f", {run['steps']} steps" if run["steps"] == LONG else ", equal time"
            cells[run["base"], f"{run['subject']}, rank {run['rank']}{length}"].append(run)
    table = []
    for (base, subject), found in cells.items():
        loss, kl = (np.mean([run[key] for run in found], axis=0) for key in ("loss", "kl"))
        means = [float(np.mean(run["kl"])) for run in found]
        figures = {"perplexity": perplexity(loss), "KL from dense": mean_interval(kl)}
        case = f"smollm2-135m, {base}, {STEPS} steps of {BATCH}x{LENGTH}, wiki.test.raw 10x1024"
        shared = {"machine": found[0]["machine"]}
        for metric, figure in figures.items():
            unit = "1" if metric == "perplexity" else "nats"
            table.append(
                rows.row(
                    case,
                    metric,
                    unit,
                    subject,
                    figure.value,
                    low=figure.low,
                    high=figure.high,
                    samples=figure.samples,
                    **shared,
                )
            )
        if "rate" in found[0]:
            table.append(rows.row(case, "learning rate", "1", subject, found[0]["rate"], samples=1, **shared))
            table.append(
                rows.row(
                    case,
                    "held-out loss",
                    "nats",
                    subject,
                    float(np.mean([r["held_out"] for r in found])),
                    samples=len(found),
                    **shared,
                )
            )
            table.append(
                rows.row(
                    case,
                    "KL from dense over seeds",
                    "nats",
                    subject,
                    float(np.mean(means)),
                    low=min(means),
                    high=max(means),
                    samples=len(found),
                    **shared,
                )
            )
    for run in runs:
        if run["subject"] == "step":
            base = next(each["seconds"] for each in runs if each["subject"] == "step" and each["of"] == PEER)
            table.append(
                rows.row(
                    f"smollm2-135m, {run['base']}, rank {MIDDLE}, {BATCH}x{LENGTH}", "seconds a step", "s", run["of"], run["seconds"], samples=10,
                    peer=PEER, peer_value=base, machine=run["machine"],
                )
            )  # fmt: skip
    rows.write("recovery", table)


if __name__ == "__main__":
    main()
