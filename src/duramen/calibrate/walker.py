"""Layer streaming: every block is opened once, watched, edited, saved, and left behind.

For each block and each of its stages (projections that read the same tensor) the walker streams the statistics of the
stage's inputs over all calibration batches, lets the step edit the stage, and goes on; then the edited block's true
output feeds the next block. Memory holds one block and two boundaries of activations (four if the step wants the dense
model's activations as well), whatever the number of blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from duramen.calibrate import ranks
from duramen.calibrate.activations import Activations, Budget, check_activations
from duramen.calibrate.passes import Passes
from duramen.calibrate.statistics import Statistics
from duramen.families.model import BlockModel, Call, Layer, OpenBlock
from duramen.grids import Format, Quantized
from duramen.problem import Exit, Problem
from duramen.rounding import start_rounding
from duramen.rundir import Finished

SCRATCH = "activations-"
"""How the names of the folders begin in which activations wait on disk."""
Records = list[dict[str, Any]]
Edit = Callable[[list[Layer], Statistics], Callable[[Layer], dict[str, Any]]]
"""Prepares a stage from the statistics of its inputs; what comes back edits one of its layers (``layer.write``) and gives a record."""


Memo = Callable[[str, Callable[[], Any]], Any]
"""(name, compute) -> a JSON value."""


class Store(Protocol):
    """Where finished blocks are kept; see ``duramen.rundir``."""

    def load(self, index: int) -> tuple[dict[str, Tensor], Records] | None:
        """The edited tensors and records of a finished block, or None."""

    def save(self, index: int, block: Finished) -> None:
        """Keeps a finished block, durably."""


class Reshape(Protocol):
    """Gives finished blocks other shapes when the model is put together; see ``duramen.shrink.surgery``."""

    @property
    def blocks(self) -> list[int]:
        """The blocks that stay, in order."""

    @property
    def config(self) -> dict[str, Any]:
        """The config of what stays."""

    @property
    def files(self) -> Mapping[str, str]:
        """What the new shapes need beside the weights: name -> content."""

    @property
    def summary(self) -> dict[str, Any]:
        """What changed, for the report: sizes before and after, units that stay, and what opens the result."""

    def block(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What stays of one block's tensors, by their paths inside it."""

    def stored_name(self, name: str) -> str:
        """Under which name a tensor of the source goes into the new checkpoint."""

    def masks(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What stays of bit-packed masks, by the names that the layers have afterwards."""


@dataclass
class Walk:
    """How to walk.

    Attributes:
        batch_size: Sequences per forward pass.
        activation_memory: Bytes of activations to hold in memory; what exceeds them is kept on disk, in ``scratch``.
        scratch: Folder for it, emptied at the end; None for the system's own.
        store: Keeps finished blocks, so that a walk can be resumed.
        memo: (name, compute) -> what ``compute`` gave, now or in an earlier run that is resumed.
        folder: Where a method may keep files of its own, which a resumed run finds again; None for nowhere.
        parent: Folder of the model that the recipe began with, where an earlier step has edited it since.
        workers: Processes among which a search divides its candidates; 0 for this one alone.
        address: Ray cluster that they belong to; empty for this machine.
        progress: Called with each layer's record as it is finished.
        told: Called with (steps done, held-out loss) while a step trains.
        training: What a step that trains has to say of it, set by the step.
        said: What a step that loses nothing has to say of itself, set by the step.
        final_hidden: Hidden states of the first batch after the last block that was walked, [B, T, D], set by the walk.
        first_batch: Its token ids, [B, T].
        reshape: What else becomes of the finished blocks, set by methods that change shapes.
        files: What else goes beside the weights of the finished model, name -> content, or the file to take; set by methods.
        outside: Tensors outside the blocks that are not what they were, by the network's names; set by methods.
    """

    batch_size: int = 8
    activation_memory: int = 2 * 2**30
    scratch: Path | None = None
    store: Store | None = None
    memo: Memo = lambda name, compute: compute()
    folder: Path | None = None
    parent: Path | None = None
    workers: int = 0
    address: str = ""
    progress: Callable[[dict[str, Any]], None] = lambda record: None
    told: Callable[[int, float], None] = lambda step, loss: None
    training: dict[str, Any] | None = None
    said: str = ""
    final_hidden: Tensor | None = field(default=None, repr=False)
    first_batch: Tensor | None = field(default=None, repr=False)
    reshape: Reshape | None = field(default=None, repr=False)
    files: dict[str, str | Path] = field(default_factory=dict, repr=False)
    outside: dict[str, Tensor] = field(default_factory=dict, repr=False)


@dataclass
class _Boundary:
    """Hidden states of every batch before the open block, and how blocks are called: in the edited model, and in the dense one."""

    edited: Activations
    dense: Activations | None
    calls: list[list[Call]]
    dense_calls: list[list[Call]]
    parent: BlockModel | None
    held_out: list[bool]

    def passes(self, module: nn.Module, index: int) -> Passes:
        """The passes of block ``index`` of the edited model from this boundary on."""
        return Passes(module, [calls[index] for calls in self.calls], self.edited)

    def dense_passes(self, module: nn.Module, index: int) -> Passes:
        """The same of the dense model."""
        assert self.dense is not None
        return Passes(module, [calls[index] for calls in self.dense_calls], self.dense)


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
    parent: BlockModel | None = None,
    formats: Mapping[str, Format] | None = None,
) -> Records:
    """Goes through all blocks and edits the named layers.

    Args:
        model: What to edit.
        tokens: Calibration token ids, [S, T].
        edit: Called for every stage with its named layers and the statistics of their inputs; then its result, for every layer.
        names: Full names of the layers to edit.
        walk: Batch size, store, progress.
        held_out_every: Every n-th sequence is held out for validation; 0 holds out none.
        dense_target: Whether to run the dense model in step, for the statistics of its inputs too.
        parent: What that is: a model with as many blocks, whose layers the edited ones know as theirs (``layer.parent``); None for
            the model as it was before.
        formats: What modules round from here on, by their names; the edited model runs so from the block's first stage on.

    Returns:
        The records of all layers, in order.

    Raises:
        Problem: If activations are not finite, or a layer saw no tokens.
    """
    batches, held_out = split_batches(tokens, walk.batch_size, held_out_every)
    mine = _share_of_this_rank(len(batches))
    with TemporaryDirectory(dir=walk.scratch, prefix=SCRATCH) as scratch:
        boundary = _first_boundary(
            model, [batches[number] for number in mine], walk, Path(scratch), dense=dense_target, parent=parent
        )
        boundary.held_out = [held_out[number] for number in mine]
        records: Records = []
        for index in range(_blocks_to_walk(model, names, walk)):
            found = walk.store.load(index) if walk.store else None
            if found is None:
                records += _edit_block(
                    model, index, boundary, edit, set(names), walk, formats or {}, held_out=held_out_every > 0
                )
            else:
                _advance_finished(model, index, boundary, found[0], formats or {})
                records += found[1]
        walk.final_hidden, walk.first_batch = boundary.edited[0], batches[mine[0]]
    return records


def _share_of_this_rank(batches: int) -> list[int]:
    """Every rank takes every n-th batch."""
    if batches < ranks.count():
        raise Problem(
            f"{batches} batches of calibration sequences do not go round {ranks.count()} ranks.",
            why="every rank walks at least one batch.",
            fix="more calibration sequences, or fewer processes.",
        )
    return list(range(ranks.rank(), batches, ranks.count()))


def _first_boundary(
    model: BlockModel, batches: list[Tensor], walk: Walk, scratch: Path, *, dense: bool, parent: BlockModel | None
) -> _Boundary:
    budget = Budget(walk.activation_memory)
    calls: list[list[Call]] = []
    dense_calls: list[list[Call]] = []

    def before_the_first_block(of: BlockModel, into: list[list[Call]]) -> Iterator[Tensor]:
        for batch in batches:
            hidden, calls_of_batch = of.capture(batch)
            into.append(calls_of_batch)
            yield hidden

    edited, same = Activations(before_the_first_block(model, calls), budget, scratch / "edited"), None
    if dense:
        copies = (edited[number].clone() for number in range(len(edited)))
        source = before_the_first_block(parent, dense_calls) if parent else copies
        same = Activations(source, budget, scratch / "dense")
    return _Boundary(edited, same, calls, dense_calls or calls, parent if dense else None, [])


def _blocks_to_walk(model: BlockModel, names: Sequence[str], walk: Walk) -> int:
    """All blocks if finished ones are kept, since they become a whole model; else none beyond the last that is edited."""
    where = model.layer_names()
    return len(model.blocks) if walk.store else 1 + max((where[name][1] for name in names), default=-1)


def split_batches(tokens: Tensor, size: int, held_out_every: int) -> tuple[list[Tensor], list[bool]]:
    """Batches of sequences and, for each, whether it is held out; every n-th sequence is, and keeps to its own batches."""
    aside = _every(len(tokens), held_out_every) if held_out_every else torch.zeros(len(tokens), dtype=torch.bool)
    train = list(torch.split(tokens[~aside], size))
    kept = list(torch.split(tokens[aside], size)) if aside.any() else []
    return train + kept, [False] * len(train) + [True] * len(kept)


def set_aside(sequences: int, share: float, setting: str) -> Tensor:
    """Which of so many sequences are set apart: every n-th, bool [S].

    Raises:
        Problem: If there are too few to set one apart.
    """
    every = round(1 / share)
    if sequences < every:
        raise Problem(
            f"{sequences} calibration sequences leave none to set apart.",
            why=f"one in {every} is (`{setting}`), to choose by what nothing was fitted to.",
            fix=f"at least {every} sequences (`calibration.sequences`).",
        )
    return _every(sequences, every)


def _every(sequences: int, n: int) -> Tensor:
    """Every n-th of so many sequences, bool [S]."""
    return torch.arange(sequences) % n == n - 1


def _edit_block(
    model: BlockModel,
    index: int,
    boundary: _Boundary,
    edit: Edit,
    names: set[str],
    walk: Walk,
    formats: Mapping[str, Format],
    *,
    held_out: bool,
) -> Records:
    """Edits one block and moves the boundary past it."""
    records: Records = []
    with ExitStack() as opened:
        block = opened.enter_context(model.opened(index))
        dense = _dense_passes(block, boundary, opened)
        rounded = _rounded_from_here(model, block, formats)
        passes = boundary.passes(block.module, index)
        stages = _stages_to_edit(model, block, names)
        if dense:
            dense.settle(_settled(block.layers.values(), []))
        for number, layers in enumerate(stages):
            passes.settle(_settled(block.layers.values(), list(chain(*stages[number:]))))
            statistics = _observe(layers[0], passes, dense, boundary.held_out, held_out=held_out)
            for record in _edit_stage(layers, statistics, edit):
                records.append(record)
                walk.progress(record)
        if walk.store and ranks.leads():
            edited = dict(chain(*(layer.edited.items() for layer in block.layers.values())))
            masks = {layer.name: layer.pruned for layer in block.layers.values() if layer.pruned is not None}
            codes = {layer.name: layer.quantized for layer in block.layers.values() if layer.quantized is not None}
            walk.store.save(index, Finished(block.tensors | edited, records, masks, codes, rounded))
        ranks.wait()
        for each in filter(None, (passes, dense)):
            each.advance(f"{model.family.blocks}.{index}")
    return records


def _dense_passes(block: OpenBlock, boundary: _Boundary, opened: ExitStack) -> Passes | None:
    """The passes of the same block of the dense model, if it runs in step; the layers get to know theirs."""
    if boundary.dense is None:
        return None
    if boundary.parent is None:
        return boundary.dense_passes(copy.deepcopy(block.module), block.index)
    source = opened.enter_context(boundary.parent.opened(block.index))
    for path, layer in block.layers.items():
        layer.parent = source.layers.get(path)
    return boundary.dense_passes(source.module, block.index)


def _edit_stage(layers: list[Layer], statistics: Statistics, edit: Edit) -> Iterator[dict[str, Any]]:
    """Edits the layers of a stage, as many at a time as there are ranks, and yields their records."""
    edit_layer = edit(layers, statistics)
    for first in range(0, len(layers), ranks.count()):
        together = layers[first : first + ranks.count()]
        done: tuple[dict[str, Any], dict[str, Tensor], Tensor | None, Quantized | None] | None = None
        for layer in together[ranks.rank() : ranks.rank() + 1]:
            head = {"layer": layer.name, "role": layer.projection.role, "block": layer.block, "tokens": statistics.tokens}
            record = head | edit_layer(layer)
            done = record, layer.edited, layer.pruned, layer.quantized
        for owner, layer in enumerate(together):
            record, edited, pruned, quantized = ranks.shared(done if owner == ranks.rank() else None, owner)
            if owner != ranks.rank():
                layer.take_over(edited, pruned, quantized)
            yield record


def _stages_to_edit(model: BlockModel, block: OpenBlock, names: set[str]) -> list[list[Layer]]:
    """The layers to edit, those with the same input together, in running order."""
    stages = [[block.layers[item.path] for item in stage] for stage in model.stages(block.index)]
    chosen = [[layer for layer in stage if layer.name in names] for stage in stages]
    return [layers for layers in chosen if layers]


def _settled(layers: Iterable[Layer], left: list[Layer]) -> set[str]:
    """The children of the block and the layers in which nothing is ``left`` to edit, by their paths."""
    paths, pending = ({layer.projection.path for layer in each} for each in (layers, left))
    return (paths - pending) | ({path.split(".")[0] for path in paths} - {path.split(".")[0] for path in pending})


def _rounded_from_here(model: BlockModel, block: OpenBlock, formats: Mapping[str, Format]) -> dict[str, Format]:
    """Makes the modules of an open block round what their formats say; those formats."""
    prefix = f"{model.family.blocks}.{block.index}."
    own = {name: each for name, each in formats.items() if name.startswith(prefix)}
    start_rounding(block.module, {name.removeprefix(prefix): each for name, each in own.items()})
    return own


def _advance_finished(
    model: BlockModel, index: int, boundary: _Boundary, edited: dict[str, Tensor], formats: Mapping[str, Format]
) -> None:
    if boundary.dense:
        with (boundary.parent or model).opened(index) as block:
            boundary.dense_passes(copy.deepcopy(block.module), index).advance(f"{model.family.blocks}.{index}")
    with model.opened(index, edited=edited) as block:
        _rounded_from_here(model, block, formats)
        boundary.passes(block.module, index).advance(f"{model.family.blocks}.{index}")


def _observe(layer: Layer, passes: Passes, dense: Passes | None, aside: list[bool], *, held_out: bool) -> Statistics:
    """Streams the statistics of the input of one stage over all batches of all ranks."""
    inputs, device, source_layer = layer.read().shape[1], passes.hidden[0].device, layer.parent or layer
    source_inputs = source_layer.read().shape[1] if dense else 0
    statistics = Statistics(
        inputs,
        held_out=held_out,
        dense_inputs=source_inputs,
        held_out_cross=held_out and layer.parent is not None,
        device=device,
    )
    for batch, kept in enumerate(aside):
        seen = passes.stage_input(layer, batch)
        if seen is None:
            raise _never_called(layer.name)
        check_activations(seen, layer.name)
        source = dense.stage_input(source_layer, batch) if dense else None
        statistics.update(seen, dense=source, held_out=kept)
    ranks.add_up(statistics)
    return statistics


def _never_called(name: str) -> Problem:
    return Problem(
        f"{name} saw no tokens.",
        why="the block never calls it as a module, or a router sent it nothing.",
        fix=f"leave it out with `skip: [{name}]`.",
        code=Exit.INCOMPATIBLE,
    )
