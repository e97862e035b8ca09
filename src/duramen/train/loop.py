"""The training loop: AdamW on a few parameters; the same bits however often it is stopped, the same but for rounding by any number of processes.

Which sequences a step sees follows from its number alone; a checkpoint holds parameters, moments and the number; the loss of a step is the
sum over all its target tokens divided by how many there are in all processes together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from duramen.calibrate import ranks
from duramen.override import override
from duramen.problem import Exit, Problem
from duramen.train.checkpoint import Checkpoints
from duramen.train.schedule import Schedule

WINDOW, MOST_SKIPPED = 128, 10
"""Steps that say what is usual, and how many of them may be left out."""


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
        norms: Of the gradient of every step, before it was clipped.
        skipped: Steps, from 0, that were left out since their loss or gradient was far above those before.
    """

    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    terms: list[dict[str, float]] = field(default_factory=list)
    best: int = 0
    norms: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)


def train(
    groups: Sequence[dict[str, Any]],
    task: Task,
    schedule: Schedule,
    *,
    folder: Path | None = None,
    tell: Callable[[int, float], None] = lambda step, loss: None,
    names: Sequence[str] = (),
    after: Callable[[int, History], None] = lambda done, history: None,
) -> History:
    """Trains, or goes on where an earlier run stopped; in the end the parameters are those of the least held-out loss, or the last.

    Parameters that are sharded over the processes (FSDP2) have their gradients added up by their module, all others here.

    Args:
        groups: Parameters with their learning rates (``params``, ``lr``), as for AdamW, and what else AdamW takes of a group.
        task: What is trained on.
        schedule: How long and how fast.
        folder: Where to keep checkpoints; None for nowhere.
        tell: Called with (steps done, held-out loss).
        names: Of the parameters in checkpoints, in order; numbers without.
        after: Called after every step with the steps done and what happened.

    Raises:
        Problem: If the loss is not finite, or too many steps had to be left out; the last checkpoint stays.
    """
    run = _Run(groups, task, schedule, Checkpoints(folder, keep=schedule.keep, milestones=schedule.milestones), names)
    run.resume()
    try:
        if not run.history.held_out:
            run.look(0, tell)
        for step in range(len(run.history.losses), schedule.steps):
            run.step(step)
            done = step + 1
            if done % schedule.every == 0 or done == schedule.steps:
                run.look(done, tell)
                run.save(done)
            after(done, run.history)
    finally:
        run.checkpoints.wait()
    if schedule.best:
        with torch.no_grad():
            for parameter, kept in zip(run.parameters, run.best, strict=True):
                parameter.copy_(kept)
    return run.history


class _Run:
    """A training: what it works with, and how far it is."""

    def __init__(
        self, groups: Sequence[dict[str, Any]], task: Task, schedule: Schedule, checkpoints: Checkpoints, names: Sequence[str]
    ) -> None:
        self.parameters: list[Tensor] = [parameter for group in groups for parameter in group["params"]]
        self.names = list(names) or [f"{number:06d}" for number in range(len(self.parameters))]
        self.rates = [group["lr"] for group in groups]
        self.optimizer = torch.optim.AdamW([dict(group) for group in groups], weight_decay=0.0)
        self.task, self.schedule, self.checkpoints = task, schedule, checkpoints
        self.history, self.best = History(), list[Tensor]()
        self.sharded = any(isinstance(parameter, DTensor) for parameter in self.parameters)
        if self.sharded and schedule.batch % ranks.count():
            raise Problem(
                f"{ranks.count()} processes cannot share batches of {schedule.batch}.", why="each takes as many rows as the others.",
                fix=f"a `batch` that {ranks.count()} divides.",
            )  # fmt: skip

    def step(self, step: int) -> None:
        """One step: gradients of all parts and processes, then the update, unless it is an outlier."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.schedule.rate(step)
        loss, norm = self.gradients(step)
        if not (math.isfinite(loss) and math.isfinite(norm)) and not self.schedule.skip:
            raise Problem(
                f"The loss of step {step + 1} is {loss:.4g}, its gradient has norm {norm:.4g}.",
                why="the learning rate is too high, or the model overflows in this type.",
                fix="half the `learning_rate`, or `dtype: float32`, and another OUT folder; this one goes on from its last checkpoint.",
                code=Exit.CHECK_FAILED,
            )
        if self.schedule.skip and self.outlier(loss, norm):
            self.leave_out(step)
        else:
            self.optimizer.step()
        self.history.losses.append(loss)
        self.history.norms.append(norm)

    def gradients(self, step: int) -> tuple[float, float]:
        """Loss over all target tokens of a step, and the norm of its gradient, which is then clipped."""
        chosen = self.schedule.sequences(step, self.task.sequences)
        targets = max(1, sum(map(self.task.targets, chosen)))
        mine, total = chosen[ranks.rank() :: ranks.count()], torch.zeros((), dtype=torch.float64)
        self.optimizer.zero_grad()
        with drawn_anew(self.schedule.seed, step):
            for start in range(0, len(mine), self.schedule.at_once):
                loss = self.task.loss(mine[start : start + self.schedule.at_once]) / targets
                (loss * ranks.count() if self.sharded else loss).backward()  # type: ignore[no-untyped-call]  # FSDP2 takes a mean
                total += loss.detach().double().cpu()
        ranks.add(total)
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if not self.sharded:
                ranks.add(parameter.grad)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.schedule.clip)
        return float(total), float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def outlier(self, loss: float, norm: float) -> bool:
        """Whether a step is not finite, or more than six deviations above the mean of the last ones that were taken."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return True
        skipped, done = set(self.history.skipped), len(self.history.losses)
        recent = range(done - 1, max(-1, done - 1 - WINDOW - MOST_SKIPPED), -1)
        taken = [step for step in recent if step not in skipped][:WINDOW]
        if len(taken) < WINDOW:
            return False
        for value, before in ((loss, self.history.losses), (norm, self.history.norms)):
            last = torch.tensor([before[step] for step in taken], dtype=torch.float64)
            if value > float(last.mean() + 6 * last.std()):
                return True
        return False

    def leave_out(self, step: int) -> None:
        """Counts a step that is left out; too many stop the training.

        Raises:
            Problem: Then.
        """
        self.history.skipped.append(step)
        recent = [left for left in self.history.skipped if left > step - WINDOW]
        if len(recent) > MOST_SKIPPED:
            raise Problem(
                f"{len(recent)} of the last {WINDOW} steps had to be left out, the last one step {step + 1}.",
                why="loss or gradient jumped or was not finite: the learning rate is too high, or the data is damaged there.",
                fix="half the `learning_rate`, and another OUT folder; the last checkpoint is kept.", code=Exit.CHECK_FAILED,
            )  # fmt: skip

    def look(self, done: int, tell: Callable[[int, float], None]) -> None:
        """Takes the held-out loss, and keeps the parameters if it is the least."""
        with torch.no_grad():
            terms = self.task.held_out()
        loss = terms.pop("loss")
        if not math.isfinite(loss):
            raise Problem(
                f"The held-out loss after {done} steps is {loss:.4g}.",
                why="training diverged." if done else "the model overflows in this type, before any training.",
                fix="half the `learning_rate`, and another OUT folder." if done else "`dtype: float32`.",
                code=Exit.CHECK_FAILED,
            )
        better = not self.history.held_out or loss < min(found for _, found in self.history.held_out)
        self.history.held_out.append((done, loss))
        self.history.terms.append(terms)
        tell(done, loss)
        if better:
            self.history.best = done
            if self.schedule.best:
                self.best = [parameter.detach().clone() for parameter in self.parameters]

    def state(self) -> dict[str, Tensor]:
        """All tensors that decide how the training goes on, by name."""
        found = {}
        for number, (name, parameter) in enumerate(zip(self.names, self.parameters, strict=True)):
            kept = self.optimizer.state[parameter]
            if not kept:
                kept |= {"step": torch.zeros(())} | {each: torch.zeros_like(parameter) for each in ("exp_avg", "exp_avg_sq")}
            found[name] = parameter.detach()
            found |= {f"{each}.{name}": tensor for each, tensor in kept.items()}
            if self.schedule.best:
                found[f"best.{name}"] = self.best[number]
        return found

    def save(self, done: int) -> None:
        """Writes a checkpoint."""
        self.checkpoints.save(done, self.state(), asdict(self.history))

    def resume(self) -> None:
        """Puts the last checkpoint in place, if there is one."""
        if self.schedule.best:
            self.best = [torch.empty_like(parameter) for parameter in self.parameters]
        found = self.checkpoints.restore(self.state)
        if found is None:
            return
        _, kept = found
        self.history = History(**kept | {"held_out": [(done, loss) for done, loss in kept["held_out"]]})


@contextmanager
def drawn_anew(seed: int, step: int) -> Iterator[None]:
    """What a step draws, such as dropout, follows from its number and the process's, whatever was drawn before."""
    used = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    device = torch.cuda.current_device() if used else None
    with torch.random.fork_rng(devices=[] if device is None else [device]):
        torch.manual_seed((1_000_003 * seed + step) * 4099 + ranks.rank())
        yield
