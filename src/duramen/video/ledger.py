"""What activations take: every byte that an operator brings to life, until its storage dies, with the operator and the module at the moment when most were alive.

Memory that a device says is in use holds weights, caches of the allocator and libraries; this is none of that, so that the same figure comes out on any machine, with real tensors or with fake ones, which hold no data.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_open: list[_Counting] = []


@dataclass
class Ledger:
    """What was counted.

    Attributes:
        peak: Most bytes that were alive at once.
        at_peak: What was alive then, (operator and module, bytes), the largest first.
        curve: Bytes alive after each operator.
    """

    peak: int = 0
    at_peak: list[tuple[str, int]] = field(default_factory=list)
    curve: list[int] = field(default_factory=list)


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operators make; of what was there before it knows nothing."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger, self.now = ledger, 0
        self.alive = Counter[str]()
        self.sizes: dict[int, tuple[int, str]] = {}
        self.inside: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        there = {_key(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        given = func(*args, **(kwargs or {}))
        for each in tree_leaves(given):
            if isinstance(each, Tensor) and _key(each) not in there and _key(each) not in self.sizes:
                self._born(each, str(func).split(".")[1])
        self.ledger.curve.append(self.now)
        return given

    def _born(self, tensor: Tensor, operator: str) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        name = f"{operator} in {self.inside[-1] if self.inside else 'the pipeline'}"
        self.sizes[key] = (storage.nbytes(), name)
        weakref.finalize(storage, self._died, key)
        self._add(name, storage.nbytes())
        if self.now > self.ledger.peak:
            self.ledger.peak, self.ledger.at_peak = self.now, [each for each in self.alive.most_common() if each[1]]

    def _died(self, key: int) -> None:
        size, name = self.sizes.pop(key)
        self._add(name, -size)

    def _add(self, name: str, size: int) -> None:
        self.now += size
        self.alive[name] += size

    def emptied(self, tensor: Tensor) -> None:
        """A storage whose memory was given back while tensors still point to it."""
        size, name = self.sizes.get(_key(tensor), (0, ""))
        if size:
            self._add(name, -size)
            self.sizes[_key(tensor)] = (0, name)


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


@contextmanager
def counted(*modules: nn.Module) -> Iterator[Ledger]:
    """Counts what operators bring to life inside.

    Args:
        modules: Those whose parts are named in the account.
    """
    ledger = Ledger()
    counting = _Counting(ledger)
    hooks = []
    for module in modules:
        for name, part in module.named_modules():
            hooks.append(part.register_forward_pre_hook(partial(_enter, counting, name or type(module).__name__)))
            hooks.append(part.register_forward_hook(partial(_leave, counting), always_call=True))
    _open.append(counting)
    try:
        with counting:
            yield ledger
    finally:
        _open.remove(counting)
        for hook in hooks:
            hook.remove()


def _enter(counting: _Counting, name: str, *_: Any) -> None:
    counting.inside.append(name)


def _leave(counting: _Counting, *_: Any) -> None:
    counting.inside.pop()


def release(tensor: Tensor) -> None:
    """Gives the memory of a tensor back although others may still point to it; nobody may read it any more."""
    for counting in _open:
        counting.emptied(tensor)
    tensor.untyped_storage().resize_(0)


def peak_of(function: Any, *modules: nn.Module) -> int:
    """Most bytes alive while a function runs without gradients; its result is alive at the end."""
    with torch.no_grad(), counted(*modules) as ledger:
        function()
    return ledger.peak
