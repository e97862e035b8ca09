"""Claim: fused importance with repair leaves a cut model nearest to the dense one, at every ratio.

    python benchmarks/structured_quality.py --text wiki.test.raw
    python benchmarks/structured_quality.py --text wiki.test.raw --model gemma3-270m
    python benchmarks/structured_quality.py --text wiki.test.raw --peer-python PEER/bin/python     # with torch-pruning

Cuts a share of the block parameters, the same in every block, so that all subjects have the same shape at a ratio, bytes and
multiply-adds; ``fusion global`` is the default of the method, which spreads the same share over the model, and ``fusion global 0`` and ``1`` are one granularity alone spread so. The scores come from the same calibration tokens, once for all ratios (``seconds`` of later ones are without them); the repair is the default one, or none. Measures perplexity and KL from
dense, the paired difference of the KL from that of the default, and that of fusion from the better of the two granularities that it blends. Adds to benchmarks/results/structured_quality.csv after
every run, and the KL of every window to structured_quality.json; runs that stand there are left out. About four hours a model on 2 cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import rows
from duramen.calibrate.backward import walk_back
from duramen.calibrate.walker import Walk
from duramen.evaluate.perplexity import divergence, final_hidden, perplexity
from duramen.families.model import BlockModel, OpenBlock
from duramen.hardware.machine import fastest_device, forward_dtype
from duramen.intervals import mean_interval
from duramen.rundir import Finished
from duramen.shrink import flap, fusion, wanda_sp
from duramen.shrink.groups import Units, find_units
from duramen.shrink.importance import Taylor
from duramen.shrink.model import ShrinkSettings, budget, carry_out, choose, kept_units
from duramen.shrink.plan import Plan
from duramen.shrink.surgery import Surgery, masked
from peers import ask
from pruning_quality import Bench, arguments, exactly

RATIOS = ("10%", "20%", "30%", "50%")
REPAIRS = {"": "affine", ", no repair": "none"}
DEFAULT = "fusion global"
BLENDS = {"fusion global": "fusion global", "fusion attention": "fusion fixed"}
"""And what names the two granularities that each blends, before 0 and 1."""
UNITS = {
    "perplexity": "1",
    "KL from dense": "nats",
    "KL above the default": "nats",
    "KL above the better granularity": "nats",
    "parameters": "1",
    "MACs per token": "1",
    "seconds": "s",
}


class Scorer:
    """Every subject's scores, computed when they are asked for, and once."""

    def __init__(self, model: BlockModel, units: list[Units], tokens: Tensor, sequences: int, length: int) -> None:
        self.model, self.units, self.tokens, self.walk = model, units, tokens, Walk()
        self.sequences, self.others = fusion.pieces(tokens, sequences, length)
        self.kept: dict[str, dict[tuple[int, str], Tensor]] = {}

    def taylor(self, **settings: str) -> list[fusion.Found]:
        """Estimates of all units, from gradients."""
        found: list[fusion.Found] = []
        observer = Taylor(
            self.units, len(self.sequences), self.sequences.shape[1] - 1,
            give=lambda each, estimates: found.append(fusion.Found(each, estimates)), **settings,
        )  # fmt: skip
        walk_back(self.model, self.sequences, observer, walk=self.walk)
        return sorted(found, key=lambda each: each.units.block)

    @cached_property
    def fused(self) -> list[fusion.Found]:
        """With the defaults of fusion."""
        return self.taylor(order="second", coarse="per_sequence")

    @cached_property
    def batch(self) -> list[fusion.Found]:
        """LLM-Pruner's, of first order."""
        return self.taylor(order="first", coarse="batch")

    def by_columns(self, score: Callable[[Tensor], Tensor]) -> dict[tuple[int, str], Tensor]:
        """From the columns that read a unit."""
        found = {}
        for each in self.units:
            with self.model.opened(each.block) as block:
                (layer,) = (layer for layer in block.layers.values() if layer.name == each.reader)
                columns = score(layer.read().float())[each.columns(range(each.count))]
            found[each.block, each.kind] = columns.reshape(each.count, -1).sum(1)
        return found

    def scores(self, subject: str, settings: ShrinkSettings) -> dict[tuple[int, str], Tensor]:
        """Importance of all units by one subject; only that of ``search`` follows from the ratio."""
        if subject not in self.kept or subject == "fusion search":
            self.kept[subject] = self._scores(subject, settings)
        return self.kept[subject]

    def _scores(self, subject: str, settings: ShrinkSettings) -> dict[tuple[int, str], Tensor]:
        name, _, mode = subject.partition(" ")
        if name == "random":
            generator = torch.Generator().manual_seed(0)
            return {(each.block, each.kind): torch.rand(each.count, generator=generator) for each in self.units}
        if name == "magnitude":
            return self.by_columns(lambda weight: weight.square().sum(0))
        if name in ("wanda-sp", "flap"):
            return (wanda_sp if name == "wanda-sp" else flap).score(self.model, self.units, self.tokens, self.walk)[0]
        if name == "taylor":
            return {(each.units.block, each.units.kind): each.fused(float(mode == "vector")) for each in self.batch}
        found = [replace(each) for each in self.fused]
        kind, _, weight = mode.partition(" ")
        if kind == "global":
            kind = "fixed" if weight else "attention"
        chosen = fusion.Settings(**settings.model_dump(), fusion=kind, weight=float(weight or 0.5))
        fusion.set_shares(chosen, self.model, found, self.others, self.walk)
        return fusion.fused_scores(found)


SUBJECTS = (
    "fusion global", "fusion global 0", "fusion global 1", "fusion attention", "random", "magnitude", "wanda-sp", "flap", "taylor element", "taylor vector",
    "fusion fixed 0", "fusion fixed 1", "fusion fixed 0.5", "fusion per_group", "fusion search", "fusion ablation",
)  # fmt: skip
PEERS = ("torch-pruning magnitude", "torch-pruning taylor")
"""``attention`` is the default with equal shares; ``fixed 0`` and ``fixed 1`` are the two pure granularities that fusion blends; the others of Taylor are LLM-Pruner's, from one batch."""


class Kept:
    """Keeps the edited blocks in memory."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def load(self, index: int) -> None:
        """Nothing was finished before."""

    def save(self, index: int, finished: Finished) -> None:
        """Keeps one block."""
        self.tensors |= {name: tensor.clone() for name, tensor in finished.tensors.items()}


class Edited(BlockModel):
    """A folder's model whose blocks hold what a store kept."""

    store: Kept

    @classmethod
    def beside(cls, folder: Path, store: Kept) -> Edited:
        """Opens the folder, with the blocks of the store."""
        edited = cls.from_folder(folder, device=fastest_device())
        edited.store = store
        return edited

    @contextmanager
    def opened(self, index: int, *, edited: dict[str, Tensor] | None = None) -> Iterator[OpenBlock]:
        """Opens a block as it was kept."""
        with super().opened(index, edited=self.store.tensors | (edited or {})) as block:
            yield block


def main() -> None:
    """Runs the table."""
    parser = arguments(RATIOS, SUBJECTS)
    parser.add_argument("--families", nargs="*", default=["ffn_channel"])
    parser.add_argument("--round-to", type=int, default=16)
    parser.add_argument("--repairs", nargs="*", default=list(REPAIRS.values()))
    parser.add_argument("--set", nargs="*", default=[], help="other settings for all subjects, key=value, named in the case")
    parser.add_argument("--peer-python", default="", help="python of an environment with torch-pruning")
    parser.add_argument("--name", default="structured_quality")
    options = parser.parse_args()
    bench = Bench.open(options)
    model = BlockModel.from_folder(bench.folder, dtype=forward_dtype("auto"), device=fastest_device())
    scorer = Scorer(model, find_units(model, options.families), bench.tokens, 64, 128)
    more = dict(item.split("=") for item in options.set)
    case = f"{options.model}, {bench.tokens.numel()} tokens, {Path(options.text).name} {options.windows}x{options.window}"
    case += "".join(f", {key} {value}" for key, value in {"families": "+".join(options.families), **more}.items())
    for ratio in options.targets:
        for repair in options.repairs:
            for subject in options.subjects:
                measure(bench, model, scorer, options, more, f"{case}, {ratio}", subject, repair)
        for subject in PEERS if options.peer_python else ():
            measure(bench, model, scorer, options, more, f"{case}, {ratio}", subject, "none")


def measure(
    bench: Bench,
    model: BlockModel,
    scorer: Scorer,
    options: argparse.Namespace,
    more: dict[str, str],
    case: str,
    subject: str,
    repair: str,
) -> None:
    """One subject at one ratio, unless it stands in the table."""
    table = rows.read(options.name)
    label = subject + next(words for words, name in REPAIRS.items() if name == repair)
    if any((row["case"], row["subject"]) == (case, label) for row in table):
        return
    share = float(case.rpartition(", ")[2].removesuffix("%")) / 100
    shared = {"ratio": share, "ratio_of": "block_parameters", "families": options.families, "round_to": options.round_to}
    spread = {"allocation": "global" if subject.startswith(DEFAULT) else "local"}
    settings = ShrinkSettings.model_validate(shared | {"repair": repair} | spread | more)
    start = time.process_time()
    scores = {} if subject in PEERS else scorer.scores(subject, settings)
    plan = planned(model, scorer.units, scores, settings)
    used = ""
    if subject in PEERS:
        edited, seconds, used = cut_by_peer(bench, model, plan, scorer.sequences, options.peer_python, subject)
        hidden = final_hidden(edited, bench.windows)
    elif repair == "none":  # what is cut equals what is zeroed
        edited, seconds = bench.dense, time.process_time() - start
        with masked(edited, plan):
            hidden = final_hidden(edited, bench.windows)
    else:
        store = Kept()
        carry_out(plan, model, bench.tokens, settings, Walk(store=store))
        seconds = time.process_time() - start
        edited = Edited.beside(bench.folder, store)
        hidden = final_hidden(edited, bench.windows)
    found = divergence(bench.dense, bench.hidden, edited, hidden, bench.windows)
    summary = Surgery(model, plan).summary
    figures = {
        "perplexity": perplexity(found.loss),
        "KL from dense": mean_interval(found.kl),
        "parameters": exactly(summary["parameters"]["after"]),
        "MACs per token": exactly(summary["macs_per_token"]["after"]),
        "seconds": exactly(seconds),
    }
    windows = rows.keep_windows(options.name, case, label, found.kl.tolist())
    if DEFAULT in windows and label != DEFAULT:
        figures["KL above the default"] = mean_interval(np.array(windows[label]) - np.array(windows[DEFAULT]))
    for metric, figure in figures.items():
        bounds = {"low": figure.low, "high": figure.high} if figure.low < figure.high else {}
        versions = {"versions": rows.versions(used)} if used else {}
        table.append(rows.row(case, metric, UNITS[metric], label, figure.value, samples=figure.samples, **bounds, **versions))
    table += beside_granularities(case, windows, subject, label.removeprefix(subject))
    rows.write(options.name, table)
    print(case.rpartition(", ")[2], label, {name: round(figure.value, 4) for name, figure in figures.items()}, flush=True)


def beside_granularities(case: str, windows: dict[str, list[float]], subject: str, words: str) -> list[dict[str, object]]:
    """How far the blend that a subject belongs to is above the better of its two granularities, once all three were measured."""
    found, metric = [], "KL above the better granularity"
    for blend, pure in BLENDS.items():
        three = (blend, f"{pure} 0", f"{pure} 1")
        if subject in three and all(each + words in windows for each in three):
            mine, *others = (np.array(windows[each + words]) for each in three)
            figure = mean_interval(mine - min(others, key=np.mean))
            more = {"low": figure.low, "high": figure.high, "samples": figure.samples}
            found.append(rows.row(case, metric, UNITS[metric], blend + words, figure.value, **more))
    return found


def planned(model: BlockModel, units: list[Units], scores: dict[tuple[int, str], Tensor], settings: ShrinkSettings) -> Plan:
    """What stays by these scores; without scores, so many of each kind."""
    scores = scores or {(each.block, each.kind): torch.zeros(each.count) for each in units}
    _, wanted = budget(model, units, settings)
    return Plan("", len(model.blocks), kept_units(model, units, choose(units, scores, wanted, settings)))


def cut_by_peer(
    bench: Bench, model: BlockModel, plan: Plan, sequences: Tensor, python: str, subject: str
) -> tuple[BlockModel, float, str]:
    """The same widths by torch-pruning: the model, its processor seconds, and the versions used."""
    (widths,) = {len(stay) for stay in plan.kept["ffn_channel"]}
    found, tensors = ask(python, "peer_torch_pruning.py", bench.folder, sequences, str(widths), subject.rpartition(" ")[2])
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**Surgery(model, plan).config), dtype=torch.float32).eval()
    missing = network.load_state_dict(tensors, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"}, missing
    network.tie_weights()
    used = " ".join(f"{name}={version}" for name, version in found["versions"].items())
    return BlockModel.from_module(network.to(fastest_device())), found["processor_seconds"], f"peer:{used}"


if __name__ == "__main__":
    main()
