"""Claim: pretraining here reaches at most the loss of a plain loop at equal tokens and parameters, at no less speed.

    python benchmarks/pretraining.py out/laptop-10m
    python benchmarks/pretraining.py out/laptop-10m --only speed

The plain loop is nanoGPT's: windows of the stream of all documents with their ends, at random places, no mask between documents, AdamW with the same betas, decay and clipping, a cosine to a
tenth of the rate; the same model class, initial weights, rate, batch and number of steps. Both are measured on the held-out documents, each apart, as our stage does. Speed is
taken in turns, ten steps of each, on the same threads, and counts places of rows (for ours also target tokens). Writes benchmarks/results/pretraining.csv. The loop takes as long as the stage did.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

import rows
from duramen.hardware.clock import now
from duramen.intervals import mean_interval, paired_interval
from duramen.recipe import load_recipe
from duramen.train import pretrain
from duramen.train.checkpoint import Checkpoints
from duramen.train.data import Rows
from duramen.train.folder import make_causal, open_causal
from duramen.train.loop import _Run
from duramen.train.text import make_plan, read_corpus
from duramen.train.width import groups

PEER, MINE = "plain loop", "duramen pretrain"


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path, help="of `duramen train laptop-10m`")
    parser.add_argument("--recipe", default="laptop-10m")
    parser.add_argument("--only", choices=["speed", "loss"])
    parser.add_argument("--steps", type=int, help="of the plain loop, instead of the stage's")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    settings = next(step.settings for step in load_recipe(options.recipe).resolved() if step.method == "pretrain")
    bench = Bench(options.run / "stages", settings, options.recipe)
    if options.only != "loss":
        bench.speed(options.turns)
    if options.only != "speed":
        bench.loss(options.steps or settings.steps)


class Bench:
    """A finished run, and the plain loop beside it."""

    def __init__(self, stages: Path, settings: pretrain.Settings, name: str) -> None:
        self.settings, self.folder = settings, next(stages.glob("*-pretrain"))
        tokens = next(stages.glob("*-tokenize"))
        self.tokenizer = AutoTokenizer.from_pretrained(tokens / "tokenizer")
        self.corpus, self.aside = (
            read_corpus(tokens / "tokens", split, settings.context, self.tokenizer.pad_token_id, shared=True)
            for split in ("train", "held_out")
        )
        self.stream = np.concatenate([shard.tokens for shard in self.corpus.shards]).astype(np.int64)
        self.case = f"{name}, {settings.steps} steps of {settings.batch}x{settings.context}"
        self.table = rows.read("pretraining")

    def network(self):
        """The model as the stage began with it."""
        return make_causal(self.settings.model, len(self.tokenizer), self.settings.seed).train()

    def plain(self, network, steps: int) -> Callable[[int], Tensor]:
        """One step of the plain loop, by its number."""
        chosen = self.settings
        decay = [each for each in network.parameters() if each.ndim > 1]
        rest = [each for each in network.parameters() if each.ndim < 2]
        optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": chosen.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=chosen.learning_rate,
            betas=chosen.betas,
        )
        generator, rise = torch.Generator().manual_seed(0), max(1, round(chosen.warmup * steps))

        def step(number: int) -> Tensor:
            fall = (number - rise) / max(1, steps - rise)
            share = (number + 1) / rise if number < rise else 0.1 + 0.9 * (1 + math.cos(math.pi * fall)) / 2
            for group in optimizer.param_groups:
                group["lr"] = chosen.learning_rate * share
            starts = torch.randint(len(self.stream) - chosen.context - 1, (chosen.batch,), generator=generator)
            window = torch.stack(
                [torch.from_numpy(self.stream[start : start + chosen.context + 1]) for start in starts.tolist()]
            )
            logits = network(input_ids=window[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), chosen.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step

    def ours(self, network) -> _Run:
        """The stage's own loop, keeping nothing."""
        chosen = self.settings
        plan = make_plan(self.corpus, chosen.steps * chosen.batch, chosen.weights, chosen.seed, epochs=chosen.epochs)
        task = pretrain.NextToken(network, plan, self.held_out(), chosen.z_loss, torch.float32, chosen.at_once, apart=True)
        trained = list(
            groups(network, chosen.learning_rate, chosen.base_width, None, betas=chosen.betas, weight_decay=chosen.weight_decay)
        )
        for group in trained:
            del group["names"]
        return _Run(trained, task, chosen.schedule, Checkpoints(None), [])

    def held_out(self) -> Rows:
        """All held-out rows."""
        return pretrain.first_rows(self.aside, 10**9)

    def speed(self, turns: int) -> None:
        """Steps in turns."""
        plain, run, steps, seconds = self.plain(self.network(), 1000), self.ours(self.network()), 10, {PEER: [], MINE: []}
        places = steps * self.settings.batch * self.settings.context
        for turn in range(turns + 1):
            for name, step in ((PEER, plain), (MINE, run.step)):
                begun = now()
                for number in range(steps * turn, steps * (turn + 1)):
                    step(number)
                if turn:
                    seconds[name].append(now() - begun)
        seen = sum(
            run.task.targets(index)
            for number in range(steps * (turns + 1))
            for index in self.settings.schedule.sequences(number, run.task.sequences)
        )
        filled = seen / (places * (turns + 1))
        case = f"{self.case}, {torch.get_num_threads()} threads"
        median = {name: places / float(np.median(each)) for name, each in seconds.items()}
        for name in (PEER, MINE):
            peer = (PEER, median[PEER]) if name == MINE else None
            self.add(case, "places per second", "1/s", name, median[name], samples=turns, **rows.beside(peer))
        self.add(case, "places that are targets", "1", MINE, filled, samples=seen)
        print({name: round(each) for name, each in median.items()}, "filled", round(filled, 4), flush=True)

    def loss(self, steps: int) -> None:
        """The whole plain loop, and both on the held-out documents."""
        mine = self.by_row(open_causal(self.folder / "model"))
        network, losses = self.network(), []
        step = self.plain(network, steps)
        for number in range(steps):
            losses.append(float(step(number)))
            if number % 50 == 49:
                print(number + 1, round(float(np.mean(losses[-50:])), 4), flush=True)
        other = self.by_row(network.eval())
        (self.folder.parent / "plain.json").write_text(json.dumps({"losses": losses}))
        figures = {PEER: mean_interval(other), MINE: mean_interval(mine)}
        for name, found in figures.items():
            peer = (PEER, figures[PEER].value) if name == MINE else None
            more = {"low": found.low, "high": found.high, "samples": found.samples} | rows.beside(peer)
            self.add(self.case, "held-out loss, mean over rows", "nats", name, found.value, **more)
        apart = paired_interval(other, mine)
        self.add(
            self.case,
            "held-out loss above the plain loop's",
            "nats",
            MINE,
            apart.value,
            low=apart.low,
            high=apart.high,
            samples=apart.samples,
        )
        print({name: round(found.value, 4) for name, found in figures.items()}, apart, flush=True)

    def by_row(self, network) -> np.ndarray:
        """Mean loss of every held-out row, documents apart."""
        whole = self.held_out()
        task = pretrain.NextToken(network, make_plan(self.corpus, 1, {}, 0), whole, 0.0, torch.float32, 8, apart=True)
        with torch.no_grad():
            return np.array([float(task.terms(whole[number : number + 1])[0].mean()) for number in range(len(whole))])

    def add(self, case: str, metric: str, unit: str, subject: str, value: float, **more) -> None:
        """One row, in the place of an older one."""
        self.table[:] = [row for row in self.table if (row["case"], row["metric"], row["subject"]) != (case, metric, subject)]
        self.table.append(rows.row(case, metric, unit, subject, value, **more))
        rows.write("pretraining", self.table)


if __name__ == "__main__":
    main()
