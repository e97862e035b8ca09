"""Candidates measured by Ray workers, on this machine or on several that see the same folders.

Every worker makes what it measures with for itself. A candidate's figure does not depend on who else is measured beside it, and
figures are put back in the order of the candidates, so that the outcome is the same for any number of workers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from duramen.calibrate import ranks
from duramen.calibrate.walker import Walk
from duramen.families.model import BlockModel
from duramen.problem import Exit, Problem, need
from duramen.search.fitness import put_back, runs_of


class Measurer(Protocol):
    """What a worker does."""

    def measure(self, candidates: Sequence[Any], *by: Any) -> list[Any]:
        """A figure for every candidate, the same whoever measures it."""


Make = Callable[[BlockModel], Measurer]


class _Worker:
    """Lives in a process of its own."""

    def __init__(self, threads: int, make: Callable[[], Measurer]) -> None:
        torch.set_num_threads(threads)
        self.measurer = make()

    def measure(self, candidates: list[Any], *by: Any) -> list[Any]:
        return self.measurer.measure(candidates, *by)


class Team:
    """Some workers.

    Attributes:
        actors: Their handles.
    """

    def __init__(self, actors: list[Any]) -> None:
        self.actors = actors

    def measure(self, candidates: Sequence[Any], *by: Any) -> list[Any]:
        """Every worker takes a run of the sorted candidates; those of language models have the first blocks in common then.

        Raises:
            Problem: If a worker died.
        """
        import ray

        if not candidates:
            return []
        runs = runs_of(candidates, -(-len(candidates) // len(self.actors)))
        asked = [
            actor.measure.remote([candidates[number] for number in run], *by)
            for actor, run in zip(self.actors, runs, strict=False)
        ]
        try:
            return put_back(runs, ray.get(asked))
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            raise Problem(
                f"A worker died: {str(error).splitlines()[0]}",
                why="it ran out of memory, or its machine went away.",
                fix="the same line again, perhaps with fewer `--workers`; finished generations are kept.",
                code=Exit.CHECK_FAILED,
            ) from None


@contextmanager
def _running(make: Callable[[], Callable[[], Measurer]], count: int, address: str, device: torch.device) -> Iterator[Team]:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own = {} if address else {"num_cpus": count, "include_dashboard": False}
    ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **own)
    threads = 1 if address else max(1, (os.cpu_count() or 1) // count)
    try:
        there = int(ray.cluster_resources().get("CPU", 0))
        if there < count:
            raise Problem(
                f"{count} workers are wanted, and the cluster has {there} processors.",
                why="every worker takes one.",
                fix=f"`--workers {there}` or fewer.",
            )
        gpus = ray.cluster_resources().get("GPU", 0)
        share = {"num_gpus": min(1, gpus / count)} if device.type == "cuda" else {}
        start, shared = ray.remote(num_cpus=1, **share)(_Worker).remote, ray.put(make())
        yield Team([start(threads, shared) for _ in range(count)])
    finally:
        ray.shutdown()


def team(make: Callable[[], Callable[[], Measurer]], count: int, address: str, device: torch.device) -> Any:
    """A context with some workers; with None if there are to be none.

    Args:
        make: Gives what a worker makes its measurer with.
        count: How many.
        address: Ray cluster that they belong to; empty for this machine.
        device: What they compute on.

    Raises:
        Problem: If Ray is missing.
    """
    if not count:
        return nullcontext()
    need("Running candidates in workers", "ray", install="ray")
    return _running(make, count, address, device)


def team_of(model: BlockModel, make: Callable[[], Make], walk: Walk) -> Any:
    """``team`` for a walk through a language model, which every worker opens for itself.

    Args:
        model: The dense model.
        make: Gives what a worker makes its measurer with, from the model that it has opened.
        walk: Says how many workers, and where.

    Raises:
        Problem: If Ray is missing, the model is not in a folder, or there are several ranks.
    """
    if not walk.workers:
        return nullcontext()
    if model.checkpoint is None or ranks.count() > 1:
        reason = "the model is only in memory" if model.checkpoint is None else "this run has several ranks already"
        raise Problem("No workers can be started.", why=f"{reason}.", fix="`duramen run … --workers N` without torchrun.")
    folder, device = model.checkpoint.folder.resolve(), model.device.type
    return team(lambda: partial(_with_model, make(), folder, model.dtype, device), walk.workers, walk.address, model.device)


def _with_model(make: Make, folder: Path, dtype: torch.dtype, device: str) -> Measurer:
    return make(BlockModel.from_folder(folder, dtype=dtype, device=torch.device(device)))
