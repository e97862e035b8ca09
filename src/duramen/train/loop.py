"""The training loop: AdamW on a few parameters; the same bits however often it is stopped, the same but for rounding by any number of processes.

Which sequences a step sees follows from its number alone; a checkpoint holds parameters, moments and the number; the loss of a step is the
sum over all its target tokens divided by how many there are in all processes together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from duramen.calibrate import ranks
from duramen.override import override
from duramen.problem import Exit, Problem
from duramen.rundir import replacing

STATE = "training.pt"


class Task(Protocol):
    """What is trained on."""

    @property
    def sequences(self) -> int:
        """How many there are."""

    def targets(self, index: int) -> int:
        """Target tokens of one sequence."""

    def loss(self, indices: Sequence[int]) -> Tensor:
        """Sum over the target tokens of some sequences."""

    def held_out(self) -> dict[str, float]:
        """Mean ``loss``, and terms of it by name, on sequences that are not trained on."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: How many.
        batch: Sequences of a step, over all processes.
        at_once: Sequences that run together; the gradients of a step's parts add up.
        warmup: Share of the steps in which the rate rises; then it falls to zero.
        clip: Largest norm of a step's gradient.
        every: Steps between checkpoints, at which the held-out loss is taken.
        seed: Of the order of the sequences.
    """

    steps: int
    batch: int = 8
    at_once: int = 8
    warmup: float = 0.1
    clip: float = 1.0
    every: int = 10
    seed: int = 0

    def rate(self, step: int) -> float:
        """The share of the full learning rate at a step: a rise from zero, then a fall to zero, both straight."""
        rise = max(1, round(self.warmup * self.steps))
        return (step + 1) / rise if step < rise else (self.steps - step) / max(1, self.steps - rise)

    def sequences(self, step: int, count: int) -> list[int]:
        """What a step sees: every epoch is a new order of all sequences."""
        places = (divmod(position, count) for position in range(step * self.batch, (step + 1) * self.batch))
        return [_order(count, 1_000_003 * self.seed + epoch)[place] for epoch, place in places]


@lru_cache(maxsize=2)
def _order(count: int, seed: int) -> list[int]:
    """All sequences in a random order."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


@contextmanager
def recomputed(blocks: Iterable[nn.Module], *, wanted: bool) -> Iterator[None]:
    """Blocks that run again in the backward pass, instead of keeping all that is inside them, for a while."""
    again = [override(block, partial(checkpoint, block.forward, use_reentrant=False)) for block in blocks if wanted]
    try:
        yield
    finally:
        for undo in again:
            undo()


@dataclass
class History:
    """What happened.

    Attributes:
        losses: Of every step.
        held_out: (steps done, held-out loss), from before the first step on.
        terms: What the held-out loss is made of, by name, each time.
        best: Steps done at the least held-out loss, whose parameters are kept.
    """

    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    terms: list[dict[str, float]] = field(default_factory=list)
    best: int = 0


def train(
    groups: Sequence[dict[str, Any]],
    task: Task,
    schedule: Schedule,
    *,
    folder: Path | None = None,
    tell: Callable[[int, float], None] = lambda step, loss: None,
) -> History:
    """Trains, or goes on where an earlier run stopped; in the end the parameters are those of the least held-out loss.

    Args:
        groups: Parameters with their learning rates (``params``, ``lr``), as for AdamW.
        task: What is trained on.
        schedule: How long and how fast.
        folder: Where to keep checkpoints; None for nowhere.
        tell: Called with (steps done, held-out loss).

    Raises:
        Problem: If the loss is not finite; the last checkpoint stays.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    rates = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(list(groups), weight_decay=0.0)
    history, best = _resumed(parameters, optimizer, folder)
    if not history.held_out:
        best = _look(parameters, task, history, 0, best, tell)
    for step in range(len(history.losses), schedule.steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule.rate(step)
        history.losses.append(_step(parameters, optimizer, task, schedule, step))
        done = step + 1
        if done % schedule.every == 0 or done == schedule.steps:
            best = _look(parameters, task, history, done, best, tell)
            _keep(parameters, optimizer, history, best, folder)
    with torch.no_grad():
        for parameter, kept in zip(parameters, best, strict=True):
            parameter.copy_(kept)
    return history


def _step(parameters: list[Tensor], optimizer: Any, task: Task, schedule: Schedule, step: int) -> float:
    """One step; its loss."""
    chosen = schedule.sequences(step, task.sequences)
    targets = max(1, sum(map(task.targets, chosen)))
    mine, total = chosen[ranks.rank() :: ranks.count()], torch.zeros((), dtype=torch.float64)
    optimizer.zero_grad(set_to_none=False)
    for start in range(0, len(mine), schedule.at_once):
        loss = task.loss(mine[start : start + schedule.at_once]) / targets
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach().double().cpu()
    ranks.add(total)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        ranks.add(parameter.grad)
    norm = torch.nn.utils.clip_grad_norm_(parameters, schedule.clip)
    if not (math.isfinite(float(total)) and math.isfinite(float(norm))):
        raise Problem(
            f"The loss of step {step + 1} is {float(total):.4g}, its gradient has norm {float(norm):.4g}.",
            why="the learning rate is too high, or the model overflows in this type.",
            fix="half the `learning_rate`, or `dtype: float32`, and another OUT folder; this one goes on from its last checkpoint.",
            code=Exit.CHECK_FAILED,
        )
    optimizer.step()
    return float(total)


def _look(
    parameters: list[Tensor], task: Task, history: History, done: int, best: list[Tensor], tell: Callable[[int, float], None]
) -> list[Tensor]:
    """Takes the held-out loss; the parameters of the least one."""
    with torch.no_grad():
        terms = task.held_out()
    loss = terms.pop("loss")
    if not math.isfinite(loss):
        raise Problem(
            f"The held-out loss after {done} steps is {loss:.4g}.",
            why="training diverged." if done else "the model overflows in this type, before any training.",
            fix="half the `learning_rate`, and another OUT folder." if done else "`dtype: float32`.",
            code=Exit.CHECK_FAILED,
        )
    better = not history.held_out or loss < min(found for _, found in history.held_out)
    history.held_out.append((done, loss))
    history.terms.append(terms)
    tell(done, loss)
    if better:
        history.best = done
        return [parameter.detach().clone() for parameter in parameters]
    return best


def _keep(parameters: list[Tensor], optimizer: Any, history: History, best: list[Tensor], folder: Path | None) -> None:
    """Writes a checkpoint."""
    if folder is None or not ranks.leads():
        return
    state = {
        "parameters": [parameter.detach() for parameter in parameters], "best": best, "optimizer": optimizer.state_dict(),
        "losses": history.losses, "held_out": history.held_out, "terms": history.terms, "best_step": history.best,
    }  # fmt: skip
    with replacing(folder / STATE) as temporary:
        torch.save(tree_map_only(Tensor, Tensor.cpu, state), temporary)


def _resumed(parameters: list[Tensor], optimizer: Any, folder: Path | None) -> tuple[History, list[Tensor]]:
    """Puts the last checkpoint in place, if there is one."""
    if folder is None or not (folder / STATE).is_file():
        return History(), []
    state = torch.load(folder / STATE, weights_only=True)
    with torch.no_grad():
        for parameter, kept in zip(parameters, state["parameters"], strict=True):
            parameter.copy_(kept)
    optimizer.load_state_dict(state["optimizer"])
    held_out = [tuple(item) for item in state["held_out"]]
    return History(state["losses"], held_out, state["terms"], state["best_step"]), state["best"]
