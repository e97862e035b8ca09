"""Data-parallel calibration under torchrun: every rank walks its share of the batches, sums are added up, edits are shared.

All ranks hold the same open block and see the same sums, so they stay equal without ever exchanging activations. The layers of
a stage are edited by different ranks at the same time. Only the first rank writes. Without torchrun everything here does nothing.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, distributed

from duramen.calibrate.statistics import Moments, Statistics

T = TypeVar("T")
PATIENCE = datetime.timedelta(hours=24)
"""How long a rank waits for the others, which may be measuring or solving."""


@contextmanager
def joined() -> Iterator[None]:
    """Joins the other ranks if torchrun started this process, and leaves them at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or distributed.is_initialized():
        yield
        return
    distributed.init_process_group(_backend(), timeout=PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _backend() -> str:
    """Gloo on processors, and NCCL beside it where every process of this machine has a GPU of its own."""
    if torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return "cpu:gloo,cuda:nccl"
    return "gloo"


def count() -> int:
    """Number of ranks; 1 without torchrun."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Number of this rank, from 0, as torchrun gave it."""
    return int(os.environ.get("RANK", "0"))


def leads() -> bool:
    """Whether this is the rank that writes and measures."""
    return rank() == 0


def wait() -> None:
    """Waits until all ranks are here."""
    if count() > 1:
        distributed.barrier()


def shared(value: T | None, owner: int = 0) -> T:
    """The owner's value, on every rank."""
    box = [value]
    if count() > 1:
        distributed.broadcast_object_list(box, src=owner)
    assert box[0] is not None
    return box[0]


def led(compute: Callable[[], T]) -> T:
    """What the first rank computes, on every rank; the others wait."""
    return shared(compute() if leads() else None)


def add_up(statistics: Statistics) -> None:
    """Adds the sums of all ranks, in place."""
    if count() == 1:
        return
    for moments in (statistics.total, statistics.held_out, statistics.dense, statistics.held_out_cross):
        if moments is not None:
            _add_up_moments(moments)
    if statistics.cross is not None:
        add(statistics.cross)


def add(tensor: Tensor) -> None:
    """Adds the tensors of all ranks, in place."""
    if count() > 1:
        distributed.all_reduce(tensor)


def _add_up_moments(moments: Moments) -> None:
    number = torch.tensor(moments.count)
    for tensor in (number, moments.first, moments.second):
        add(tensor)
    moments.count = int(number)
