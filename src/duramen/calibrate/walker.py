"""Layer streaming: every block is opened once, watched, edited, saved, and left behind.

For each block and each of its stages (projections that read the same tensor) the walker streams the statistics of the
stage's inputs over all calibration batches, lets the step edit the stage, and goes on; then the edited block's true
output feeds the next block. Memory holds one block and one boundary of activations (two if the step wants the dense model's
activations as well), whatever the number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from duramen.calibrate.statistics import Statistics
from duramen.families.model import BlockModel, Call, Layer, OpenBlock, run_block
from duramen.families.table import Projection
from duramen.problem import Exit, Problem

Records = list[dict[str, Any]]
Edit = Callable[[Layer, Statistics], dict[str, Any]]
"""Edits one layer (``layer.write``) from its statistics and returns a record of it."""


class Store(Protocol):
    """Where finished blocks are kept; see ``duramen.rundir``."""

    def load(self, index: int) -> tuple[dict[str, Tensor], Records] | None:
        """The edited tensors and records of a finished block, or None."""

    def save(self, index: int, tensors: dict[str, Tensor], records: Records) -> None:
        """Keeps a finished block, durably."""


@dataclass
class Walk:
    """How to walk.

    Attributes:
        batch_size: Sequences per forward pass.
        store: Keeps finished blocks, so that a walk can be resumed.
        progress: Called with each layer's record as it is finished.
        final_hidden: Hidden states of the first batch after the last block that was walked, [B, T, D], set by the walk.
        first_batch: Its token ids, [B, T].
    """

    batch_size: int = 8
    store: Store | None = None
    progress: Callable[[dict[str, Any]], None] = lambda record: None
    final_hidden: Tensor | None = field(default=None, repr=False)
    first_batch: Tensor | None = field(default=None, repr=False)


@dataclass
class _Boundary:
    """Hidden states of every batch before the open block: as the edited model has them, and as the dense one does."""

    edited: list[Tensor]
    dense: list[Tensor] | None
    calls: list[list[Call]]
    held_out: list[bool]


@torch.no_grad()
def walk_blocks(
    model: BlockModel,
    tokens: Tensor,
    edit: Edit,
    names: Sequence[str],
    *,
    walk: Walk,
    held_out_every: int = 0,
    dense_target: bool = False,
) -> Records:
    """Goes through all blocks and edits the named layers.

    Args:
        model: What to edit.
        tokens: Calibration token ids, [S, T].
        edit: Called for every named layer with the statistics of its inputs.
        names: Full names of the layers to edit.
        walk: Batch size, store, progress.
        held_out_every: Every n-th sequence is held out for validation; 0 holds out none.
        dense_target: Whether to run the dense model in step, for the statistics of its inputs too.

    Returns:
        The records of all layers, in order.

    Raises:
        Problem: If activations are not finite, or a layer saw no tokens.
    """
    batches, held_out = split_batches(tokens, walk.batch_size, held_out_every)
    hidden, calls = model.capture(batches)
    boundary = _Boundary(hidden, [item.clone() for item in hidden] if dense_target else None, calls, held_out)
    records: Records = []
    for index in range(_blocks_to_walk(model, names, walk)):
        found = walk.store.load(index) if walk.store else None
        if found is None:
            records += _edit_block(model, index, boundary, edit, set(names), walk)
        else:
            _advance_finished(model, index, boundary, found[0])
            records += found[1]
        for batch in boundary.edited:
            _check_activations(batch, f"{model.family.blocks}.{index}")
    walk.final_hidden, walk.first_batch = boundary.edited[0], batches[0]
    return records


def _blocks_to_walk(model: BlockModel, names: Sequence[str], walk: Walk) -> int:
    """All blocks if finished ones are kept, since they become a whole model; else none beyond the last that is edited."""
    where = model.layer_names()
    return len(model.blocks) if walk.store else 1 + max(where[name][1] for name in names)


def split_batches(tokens: Tensor, size: int, held_out_every: int) -> tuple[list[Tensor], list[bool]]:
    """Batches of sequences and, for each, whether it is held out; every n-th sequence is, and keeps to its own batches."""
    position = torch.arange(len(tokens))
    aside = position % held_out_every == held_out_every - 1 if held_out_every else position < 0
    train = list(torch.split(tokens[~aside], size))
    kept = list(torch.split(tokens[aside], size)) if aside.any() else []
    return train + kept, [False] * len(train) + [True] * len(kept)


def _edit_block(model: BlockModel, index: int, boundary: _Boundary, edit: Edit, names: set[str], walk: Walk) -> Records:
    """Edits one block and moves the boundary past it. Masks that the store keeps leave memory."""
    records: Records = []
    with ExitStack() as stack:
        block = stack.enter_context(model.opened(index))
        dense = _dense_copy(block.module) if boundary.dense else None
        for stage in model.stages(index):
            layers = [block.layers[item.path] for item in stage if block.layers[item.path].name in names]
            if not layers:
                continue
            statistics = _observe(block, dense, stage[0], boundary)
            for layer in layers:
                record = {"layer": layer.name, "role": layer.role, "block": index, "tokens": statistics.tokens}
                records.append(record | edit(layer, statistics))
                walk.progress(records[-1])
        edited = {f"{layer.name}.weight": layer.edited for layer in block.layers.values() if layer.edited is not None}
        if walk.store:
            walk.store.save(index, block.tensors | edited, records)
            records = [{key: value for key, value in record.items() if key != "pruned"} for record in records]
        _advance(block.module, boundary.edited, boundary.calls, index)
        if dense is not None and boundary.dense:
            _advance(dense, boundary.dense, boundary.calls, index)
    return records


def _advance_finished(model: BlockModel, index: int, boundary: _Boundary, edited: dict[str, Tensor]) -> None:
    if boundary.dense:
        with model.opened(index) as block:
            _advance(block.module, boundary.dense, boundary.calls, index)
    with model.opened(index, edited=edited) as block:
        _advance(block.module, boundary.edited, boundary.calls, index)


def _advance(module: nn.Module, hidden: list[Tensor], calls: list[list[Call]], index: int) -> None:
    for number, batch in enumerate(hidden):
        hidden[number] = run_block(module, batch, calls[number][index])


def _dense_copy(module: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(module)


def _observe(block: OpenBlock, dense: nn.Module | None, projection: Projection, boundary: _Boundary) -> Statistics:
    """Streams the statistics of the input of one stage over all batches."""
    layer = block.layers[projection.path]
    statistics = Statistics(
        layer.read().shape[1], held_out=any(boundary.held_out), cross=dense is not None, device=boundary.edited[0].device
    )
    for number, hidden in enumerate(boundary.edited):
        call = boundary.calls[number][block.index]
        seen = stage_input(block.module, projection.path, hidden, call)
        if seen is None:
            raise _never_called(layer.name)
        _check_activations(seen, layer.name)
        source = None
        if dense is not None and boundary.dense:
            source = stage_input(dense, projection.path, boundary.dense[number], call)
        statistics.update(seen, dense=source, held_out=boundary.held_out[number])
    return statistics


class _Reached(Exception):
    """Ends a block's forward pass at the layer that is watched."""


def stage_input(module: nn.Module, path: str, hidden: Tensor, call: Call) -> Tensor | None:
    """Runs a block up to one of its layers and returns that layer's input, or None if the layer is never called."""
    seen: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    handle = module.get_submodule(path).register_forward_pre_hook(stop)
    try:
        run_block(module, hidden, call)
    except _Reached:
        return seen[0]
    finally:
        handle.remove()
    return None


def _check_activations(hidden: Tensor, name: str) -> None:
    if not torch.isfinite(hidden).all():
        raise Problem(
            f"The activations at {name} are not finite.",
            why="the model overflows in this type, or an earlier layer is damaged.",
            fix="run in float32 (`dtype: float32`); finished blocks are kept.",
            code=Exit.CHECK_FAILED,
        )


def _never_called(name: str) -> Problem:
    return Problem(
        f"{name} saw no tokens.",
        why="the block never calls it as a module, or a router sent it nothing.",
        fix=f"leave it out with `skip: [{name}]`.",
        code=Exit.INCOMPATIBLE,
    )
