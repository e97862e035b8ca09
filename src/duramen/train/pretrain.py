"""Pretraining of a causal language model, from one processor to many GPUs: the same numbers however often it is stopped, the same but for rounding on any number of processes.

Rows of packed documents, each document apart from its neighbours; the loss of a step is a sum over its target tokens in all processes, divided by how many there are. Weights are sharded
with FSDP2 under torchrun. AdamW with β = (.9, .95), decay on matrices only; a warm-up, a stable stretch and a decay (WSD, arXiv 2404.06395) or half a cosine; steps whose loss or gradient
jumps are left out; rates carry over from a narrow model to a wide one (µP). Moxin (arXiv 2412.06845) trains a Mistral so; what its scripts do wrong is told in the docs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from duramen.calibrate import ranks
from duramen.hardware.clock import now
from duramen.hardware.machine import fastest_device, forward_dtype, gigaflops
from duramen.problem import Problem
from duramen.registry import method
from duramen.rundir import replacing
from duramen.train.data import Rows, keeps_apart
from duramen.train.folder import blocks_of, check_vocabulary, gathered, make_causal, open_causal, save_causal, share_out
from duramen.train.grow import GROWN
from duramen.train.loop import History, recomputed, train
from duramen.train.objective import surprise
from duramen.train.schedule import Schedule, Shape
from duramen.train.settings import ScheduleSettings
from duramen.train.stage import MODEL, TOKENIZER, TOKENS, Stage
from duramen.train.text import Corpus, Plan, make_plan, read_corpus
from duramen.train.throughput import flops_per_token
from duramen.train.width import groups, shares, widen

METRICS = "metrics.jsonl"


class Settings(ScheduleSettings):
    """Settings of pretraining."""

    model: dict[str, Any] = Field(default_factory=dict)
    """Of a new model: `model_type` and keys of its transformers configuration; empty to go on with the model of the stage before."""
    context: Annotated[int, Field(ge=2)] = 256
    """Tokens of a row."""
    steps: Annotated[int, Field(ge=1)] = 1000
    """How many."""
    batch: Annotated[int, Field(ge=1)] = 16
    """Rows of a step, over all processes."""
    at_once: Annotated[int, Field(ge=1)] = 16
    """Rows that run together; fewer take less memory and give the same."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    """Of AdamW at its height; with `base_width` that of a model of this width."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps in which the rate rises."""
    shape: Shape = "wsd"
    """Of its fall: `linear`, `cosine`, or `wsd`, which stays and then decays."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the rate at which the fall ends."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the steps in which the rate of `wsd` falls."""
    every: Annotated[int, Field(ge=1)] = 100
    """Steps between checkpoints, at which the held-out loss is taken."""
    milestones: Annotated[int, Field(ge=0)] = 0
    """Steps between checkpoints that are kept for good; 0 for none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Of matrices."""
    z_loss: Annotated[float, Field(ge=0)] = 1e-4
    """Weight of the squared logarithm of the softmax' denominator in the loss, which keeps logits small."""
    base_width: Annotated[int, Field(ge=0)] = 0
    """Width at which `learning_rate` was chosen; it is carried over to this one. 0 takes it as it is."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Share of the rows of every source; empty for what there is of each."""
    epochs: Annotated[float, Field(gt=0)] = 4
    """How often a source may be seen."""
    only: Literal["all", "new"] = "all"
    """What is trained: everything, or only the blocks that `grow` added."""
    dtype: Annotated[str, Field(pattern="^(auto|float32|bfloat16)$")] = "auto"
    """Of what is computed; weights and moments stay in float32."""
    recompute: bool = False
    """Whether blocks run again in the backward pass instead of keeping what is inside them."""
    compile: bool = False
    """Whether torch compiles the model; worth it from minutes on."""
    held_out_rows: Annotated[int, Field(ge=1)] = 64
    """Rows of the held-out documents on which the loss is taken."""

    @property
    def schedule(self) -> Schedule:
        """The same for the loop: the last parameters are kept, steps that jump are left out."""
        return Schedule(
            self.steps, self.batch, self.at_once, self.warmup, self.clip, self.every, self.seed, self.shape, self.floor, self.decay,
            best=False, skip=True, keep=2, milestones=self.milestones,
        )  # fmt: skip


@dataclass
class NextToken:
    """The task of the loop: the next token of packed documents.

    Attributes:
        network: What learns.
        plan: The rows.
        aside: Rows that are not learned.
        z_loss: See ``Settings``.
        dtype: Of what is computed.
        at_once: Rows that run together where nothing is learned.
        apart: Whether the model is told where documents begin.
    """

    network: nn.Module
    plan: Plan
    aside: Rows
    z_loss: float
    dtype: torch.dtype
    at_once: int
    apart: bool

    @property
    def sequences(self) -> int:
        """Rows of the plan."""
        return self.plan.rows

    def targets(self, index: int) -> int:
        """Target tokens of a row."""
        return self.plan.corpus.targets(*self.plan.place(index))

    def loss(self, indices: Sequence[int]) -> Tensor:
        """Sum over the target tokens of some rows, with what keeps the logits small."""
        likelihood, size = self.terms(self.plan.corpus.rows([self.plan.place(index) for index in indices]))
        return likelihood.sum() + self.z_loss * size.square().sum()

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Mean negative log-likelihood of the held-out target tokens, in nats."""
        learning, total = self.network.training, 0.0
        self.network.eval()
        for start in range(0, len(self.aside), self.at_once):
            total += float(self.terms(self.aside[start : start + self.at_once])[0].double().sum())
        self.network.train(learning)
        return {"loss": total / int(self.aside.learned.sum())}

    def terms(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood and log of the softmax' denominator of every target token, [N] each."""
        several = rows.places is not None and bool((rows.places[:, -1] < rows.places.shape[1] - 1).any())
        device = next(self.network.parameters()).device
        rows = rows.to(device)
        places = {"position_ids": rows.places} if self.apart and several else {}
        wanted = rows.learned[:, 1:]
        half = torch.autocast(device.type, self.dtype) if self.dtype != torch.float32 and ranks.count() == 1 else nullcontext()
        with half:
            logits = self.network(input_ids=rows.tokens, use_cache=False, **places).logits[:, :-1]
        likelihood, size = surprise(logits.float(), rows.tokens[:, 1:])
        return likelihood[wanted], size[wanted]


@method("pretrain", title="Pretraining", paper="arXiv 2412.06845, 2404.06395, 2203.03466", kind="train", settings=Settings)
def apply(stage: Stage, settings: Settings) -> dict[str, Any]:
    """Trains a new model, or goes on with one, and writes ``model``.

    Args:
        stage: Has the tokens, the tokenizer, and perhaps a model.
        settings: See ``Settings``.

    Returns:
        Parameters, tokens seen by source, losses, speed and its share of the machine's peak.

    Raises:
        Problem: If tokens and model do not fit, a source is too small, or training diverges.
    """
    tokenizer = open_tokenizer(stage)
    if settings.model:
        network = make_causal(settings.model, len(tokenizer), settings.seed)
        if settings.base_width:
            widen(network, settings.base_width)
        only = None
    else:
        folder = stage.need(MODEL, "pretrain")
        network = open_causal(folder)
        check_vocabulary(network.config, len(tokenizer))
        only = new_parameters(network, folder) if settings.only == "new" else None
    return learn(stage, settings, network, only)


def open_tokenizer(stage: Stage) -> Any:
    """The tokenizer that earlier stages left."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(stage.need(TOKENIZER, "pretrain"))


def new_parameters(network: nn.Module, folder: Path) -> set[str]:
    """Names of the parameters of blocks that ``grow`` added.

    Raises:
        Problem: If it added none.
    """
    file = folder / GROWN
    if not file.is_file():
        raise Problem(
            "There are no new blocks to train alone.",
            why="the model was not grown.",
            fix="a stage `grow` before, or `only: all`.",
        )
    blocks = [dict(each.named_parameters()) for each in blocks_of(network)]
    wanted = {id(parameter) for number in json.loads(file.read_text())["new"] for parameter in blocks[number].values()}
    return {name for name, parameter in network.named_parameters() if id(parameter) in wanted}


def learn(stage: Stage, settings: Settings, network: Any, only: set[str] | None) -> dict[str, Any]:
    """Trains a network on the stage's tokens and saves it; see ``apply``.

    Args:
        stage: Has the tokens and the tokenizer.
        settings: See ``Settings``.
        network: On the processor, in float32.
        only: Names of the parameters that are trained; None for all.
    """
    tokenizer, device = open_tokenizer(stage), fastest_device()
    apart, filler = keeps_apart(network, len(tokenizer)), tokenizer.pad_token_id or 0
    corpus, aside = (
        read_corpus(stage.need(TOKENS, "pretrain"), split, settings.context, filler, shared=apart)
        for split in ("train", "held_out")
    )
    plan = make_plan(corpus, settings.steps * settings.batch, settings.weights, settings.seed, epochs=settings.epochs)
    flops = flops_per_token(network, settings.context)
    dtype = forward_dtype(settings.dtype)
    parameters = sum(each.numel() for each in network.parameters())
    network.to(device).train()
    taken = shares(network, settings.base_width)
    share_out(network, dtype)
    trained = list(
        groups(network, settings.learning_rate, taken, only, betas=settings.betas, weight_decay=settings.weight_decay)
    )
    names = [name for group in trained for name in group.pop("names")]
    if only is not None:
        network.requires_grad_(False)
        for group in trained:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
    running: Any = torch.compile(network) if settings.compile else network
    task = NextToken(running, plan, first_rows(aside, settings.held_out_rows), settings.z_loss, dtype, settings.at_once, apart)
    metrics = Metrics(stage.folder / METRICS, settings.schedule, task, flops)
    with recomputed(blocks_of(network), wanted=settings.recompute):
        history = train(trained, task, settings.schedule, folder=stage.folder, tell=stage.told, names=names, after=metrics.add)
    state = gathered(network)
    if ranks.leads():
        save_causal(network, stage.folder / MODEL, stage.need(TOKENIZER, "pretrain"), state)
    ranks.wait()
    return {
        "parameters": parameters, "trained_parameters": sum(each.numel() for group in trained for each in group["params"]),
        "context": settings.context, "sources": plan.targets(), "epochs": plan.epochs(),
        "utilisation": {name: each.utilisation for name, each in corpus.packed.items()}, "cut": {name: each.cut for name, each in corpus.packed.items()},
        "losses": history.losses, "held_out": history.held_out, "skipped": history.skipped, "last_rate": settings.schedule.rate(settings.steps - 1),
        "flops_per_token": flops, "keys_counted": "full",
    } | metrics.summary()  # fmt: skip


def first_rows(corpus: Corpus, most: int) -> Rows:
    """Rows of all sources, evenly spread, for the held-out loss."""
    wanted = [(source, number) for source, each in corpus.packed.items() for number in range(len(each.rows))]
    spread = np.linspace(0, len(wanted) - 1, min(most, len(wanted))).round().astype(int)
    return corpus.rows([wanted[place] for place in spread])


class Metrics:
    """One line of JSON for every step, cut off at the step from which training goes on.

    Args:
        file: Of the lines.
        schedule: Says the rates.
        task: Says the tokens.
        flops: Of a token.
    """

    def __init__(self, file: Path, schedule: Schedule, task: NextToken, flops: float) -> None:
        self.file, self.schedule, self.task, self.flops = file, schedule, task, flops
        self.begun: float | None = None
        self.seconds: list[float] = []
        self.counts: list[int] = []

    def add(self, done: int, history: History) -> None:
        """Called after every step."""
        if not ranks.leads():
            return
        moment = now()
        if self.begun is None:
            self._cut(done)
        else:
            self.seconds.append(moment - self.begun)
            self.counts.append(sum(map(self.task.targets, self.schedule.sequences(done - 1, self.task.sequences))))
        self.begun = moment
        line = {
            "step": done, "loss": history.losses[-1], "norm": history.norms[-1], "rate": self.schedule.rate(done - 1),
            "skipped": done - 1 in history.skipped[-1:], "tokens_per_second": self.counts[-1] / self.seconds[-1] if self.seconds else None,
        }  # fmt: skip
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def _cut(self, done: int) -> None:
        """Takes away the lines of steps that are done again."""
        if self.file.is_file():
            kept = [line for line in self.file.read_text(encoding="utf-8").splitlines() if _step(line) < done]
            with replacing(self.file) as partial:
                partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def summary(self) -> dict[str, Any]:
        """Median target tokens a second of the steps of this process, and their share of the machine's peak."""
        if not self.seconds:
            return {"tokens_per_second": None, "utilised": None}
        speeds = sorted(count / took for count, took in zip(self.counts, self.seconds, strict=True))
        speed = speeds[len(speeds) // 2]
        peak = gigaflops(torch.float32) * 1e9 if fastest_device().type == "cpu" else None
        return {"tokens_per_second": speed, "utilised": None if peak is None else speed * self.flops / peak}


def _step(line: str) -> int:
    """The step of a line; a torn line is of none that counts."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**62
