"""Folding: what a norm multiplies by becomes part of the weights that read it, or the other way round, and the model stays the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from duramen.calibrate import ranks
from duramen.calibrate.walker import Records, Walk
from duramen.families.model import BlockModel, Layer, OpenBlock
from duramen.families.norms import is_norm
from duramen.problem import Exit, Problem
from duramen.rundir import Finished

SAME = 1e-3
"""Largest difference of a block's outputs after folding, relative to the largest; 2⁻⁴ where a half type runs or is stored."""


@contextmanager
def norms_read(block: OpenBlock, layers: Mapping[str, Layer]) -> Iterator[dict[str, str]]:
    """For a while, which norm's output every layer reads, by their paths inside the block; a module that is none of the layers stands there too."""
    produced: dict[int, tuple[Tensor, str]] = {}
    found: dict[str, str] = {}

    def note(name: str) -> Any:
        return lambda _, __, output: produced.__setitem__(id(output), (output, name))

    def look(path: str) -> Any:
        def seen(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and id(args[0]) in produced:
                found[path] = produced[id(args[0])][1]

        return seen

    modules = dict(block.module.named_modules())
    handles = [module.register_forward_hook(note(name)) for name, module in modules.items() if is_norm(module)]
    leaves = {name for name, module in modules.items() if not list(module.children())}
    handles += [modules[path].register_forward_pre_hook(look(path)) for path in leaves | layers.keys()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def keep_block(walk: Walk, block: OpenBlock, records: Records) -> None:
    """Keeps an open block as it is now, where finished blocks are kept; all ranks have done the same."""
    if walk.store and ranks.leads():
        edited = {name: tensor for layer in block.layers.values() for name, tensor in layer.edited.items()}
        walk.store.save(block.index, Finished(block.tensors | edited, records))
    ranks.wait()


def check_outputs(model: BlockModel, block: int, found: Tensor, expected: Tensor, done: str) -> None:
    """Stops if a block's outputs are not what they should be after it was rotated or smoothed (``done``).

    Raises:
        Problem: If they are not.
    """
    difference = float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30))
    half = model.dtype != torch.float32 or any(
        parameter.dtype not in (torch.float32, torch.float64) for parameter in model.network.parameters()
    )
    if not difference <= (2**-4 if half else SAME):
        name = f"{model.family.blocks}.{block}"
        raise cannot(
            model,
            done,
            f"the outputs of {name} change by {difference:.2g} of the largest; something there depends on what was folded",
        )


def cannot(model: BlockModel, done: str, why: str) -> Problem:
    """An architecture that cannot be rotated or smoothed (``done``)."""
    return Problem(
        f"{type(model.network).__name__} cannot be {done}.", why=f"{why}.", fix="leave the step out.", code=Exit.INCOMPATIBLE
    )
