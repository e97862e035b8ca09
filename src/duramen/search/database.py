"""The level database: for every kind of units in every block a nested order, and what its reader's weights are at every level.

It is built in one walk. What a layer sees of the blocks before it is the model at about the target's share everywhere, and its target
is blended with the dense model's output as in any repair. A candidate of the search then differs from the dense model in the weights
of the readers only: the columns of units that are gone are zero, which equals their removal.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from duramen.calibrate.statistics import Statistics
from duramen.calibrate.walker import Walk, walk_blocks
from duramen.families.model import BlockModel, Layer, OpenBlock
from duramen.prune.layer import Stage, aim, corrected_bias, prepare
from duramen.prune.reconstruct import output_error
from duramen.rundir import BlockStore, Finished, write_tensors
from duramen.search.levels import ROUNDS, error_curve, greedy_order, level_factor, level_weight
from duramen.shrink.groups import Units, find_units
from duramen.shrink.model import RepairSettings
from duramen.shrink.plan import Plan, digest
from duramen.shrink.reform import reform
from duramen.shrink.surgery import silenced

Genome = tuple[int, ...]
"""A level for every module, in running order."""


@dataclass(frozen=True)
class Module:
    """The levels of one kind of units in one block.

    Attributes:
        units: The units.
        grid: How many of them each level keeps, ascending; 0 is *off*, and the last level keeps all.
        order: The units, the last to leave first.
        errors: Squared change of the reader's outputs at every level, as a share of their squares; 1 where it is off.
    """

    units: Units
    grid: tuple[int, ...]
    order: tuple[int, ...] = ()
    errors: tuple[float, ...] = ()

    @property
    def full(self) -> int:
        """The level that keeps all."""
        return len(self.grid) - 1

    def kept(self, level: int) -> tuple[int, ...]:
        """The units that stay at a level, sorted."""
        return tuple(sorted(self.order[: self.grid[level]]))

    def nearest(self, share: float) -> int:
        """The level that keeps most nearly this share, and is not off."""
        levels = [level for level, kept in enumerate(self.grid) if kept]
        return min(levels, key=lambda level: abs(self.grid[level] - share * self.units.count))


def grid_of(units: Units, *, levels: int, round_to: int, off: bool) -> tuple[int, ...]:
    """The numbers of units that may stay: FFN channels in about so many equal steps, KV groups one by one, and none if ``off``."""
    if units.kind != "ffn_channel":
        return tuple(range(0 if off else 1, units.count + 1))
    step = round_to * max(1, round(units.count / levels / round_to))
    return (*((0,) if off else ()), *range(step, units.count, step), units.count)


def describe(modules: Sequence[Module]) -> list[dict[str, Any]]:
    """The levels of all modules, for ``search.json``."""
    return [
        {"block": m.units.block, "kind": m.units.kind, "kept": m.grid, "order": m.order, "errors": m.errors} for m in modules
    ]


def restore(model: BlockModel, described: Sequence[dict[str, Any]]) -> list[Module]:
    """The modules of ``describe``, for a model of the same shapes."""
    kinds = dict.fromkeys(item["kind"] for item in described)
    units: dict[tuple[int, str], Units] = {(each.block, each.kind): each for each in find_units(model, tuple(kinds))}
    return [
        Module(units[item["block"], item["kind"]], tuple(item["kept"]), tuple(item["order"]), tuple(item["errors"]))
        for item in described
    ]


def plan_of(model: BlockModel, modules: Sequence[Module], genome: Genome, made_by: dict[str, Any]) -> Plan:
    """What stays of the model under a candidate; parts that are off are skipped."""
    every = {units.reader: units for units in find_units(model, tuple(dict.fromkeys(m.units.kind for m in modules)))}
    kept: dict[str, list[tuple[int, ...]]] = {each.kind: [() for _ in model.blocks] for each in every.values()}
    for each in every.values():
        kept[each.kind][each.block] = tuple(range(each.count))
    skipped: dict[int, tuple[str, ...]] = {}
    for module, level in zip(modules, genome, strict=True):
        block, kind = module.units.block, module.units.kind
        if module.grid[level] == 0:
            skipped[block] = (*skipped.get(block, ()), module.units.part)
        else:
            kept[kind][block] = module.kept(level)
    whole = {kind: tuple(blocks) for kind, blocks in kept.items()}
    return Plan(digest(model), len(model.blocks), whole, skipped=skipped, made_by=made_by)


class Database:
    """The levels of all modules; weights are read from its folder when they are asked for.

    Attributes:
        model: The dense model.
        modules: In running order.
        folder: Where the weights are.
    """

    def __init__(self, model: BlockModel, modules: Sequence[Module], folder: Path) -> None:
        self.model, self.modules, self.folder = model, list(modules), folder

    @property
    def full(self) -> Genome:
        """The dense model."""
        return tuple(module.full for module in self.modules)

    @contextmanager
    def at(self, block: OpenBlock, levels: Mapping[int, int]) -> Iterator[None]:
        """An open block with some of its modules, by number, at these levels for a while."""
        with ExitStack() as stack:
            for number, level in levels.items():
                module = self.modules[number]
                if module.grid[level] == 0:
                    stack.enter_context(silenced(block.module, self.model.family, module.units.part))
                elif level != module.full:
                    (layer,) = (layer for layer in block.layers.values() if layer.name == module.units.reader)
                    stack.enter_context(_replaced(layer, *self.reader(number, level)))
            yield

    def reader(self, number: int, level: int) -> tuple[Tensor, Tensor | None]:
        """The reader of a module at a level that is neither off nor full: weight [O, I], zero where units are gone, and bias [O]."""
        module = self.modules[number]
        return read_level(level_file(self.folder, module.units.block), "", module, level)


def numbers_in(modules: Sequence[Module], block: int) -> list[int]:
    """The numbers of the modules of one block."""
    return [number for number, module in enumerate(modules) if module.units.block == block]


def read_level(file: Path, start: str, module: Module, level: int) -> tuple[Tensor, Tensor | None]:
    """The reader of a module at a level that is neither off nor full, from a file whose names of this block begin so.

    Returns:
        Weight [O, I], zero where units are gone, and bias [O] if the file has one.
    """
    key = f"{start}{module.units.kind}.{level}"
    with safe_open(file, "pt") as stored:
        part = stored.get_tensor(f"{key}.weight")
        bias = stored.get_tensor(f"{key}.bias") if f"{key}.bias" in set(stored.keys()) else None
    return _spread(part, module.units, module.order, module.grid[level]), bias


def _spread(part: Tensor, units: Units, order: Sequence[int], kept: int) -> Tensor:
    """The columns of the first ``kept`` units in their order, [O, k] -> [O, I], zero where units are gone."""
    inputs = len(units.columns(range(units.count)))
    return part.new_zeros(len(part), inputs).index_copy(1, units.columns(order[:kept]).to(part.device), part)


@contextmanager
def _replaced(layer: Layer, weight: Tensor, bias: Tensor | None) -> Iterator[None]:
    """A layer that runs with another weight, and bias if one is given."""
    new = {"weight": weight.T if layer.projection.transposed else weight} | ({} if bias is None else {"bias": bias})
    parameters = {name: layer.linear.get_parameter(name) for name in new}
    old = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = new[name].to(parameter).contiguous()
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = old[name]


def build(
    model: BlockModel,
    modules: Sequence[Module],
    share: float,
    tokens: Tensor,
    settings: RepairSettings,
    walk: Walk,
    folder: Path,
) -> Database:
    """Builds the database, or goes on where an earlier run stopped.

    Args:
        model: The dense model; it stays as it is.
        modules: What may be cut; their units are not ordered yet.
        share: About the share of them that will stay, which the blocks before show.
        tokens: Calibration token ids, [S, T].
        settings: Damping, target and bias of every level.
        walk: How to walk.
        folder: Where to keep the levels.
    """
    store, by_reader = _LevelStore(folder), {module.units.reader: module for module in modules}

    def edit(layers: list[Layer], statistics: Statistics) -> Any:
        module = by_reader[layers[0].name]
        target = {"columns": _least(layers[0], statistics, module.units, share)}
        stage = prepare(reform, layers, statistics, settings, target)
        return partial(_find_levels, module=module, stage=stage, share=share, alpha=settings.alpha, store=store)

    held_out = round(1 / settings.held_out) if settings.damping == "held-out" else 0
    with _left_as_it_is(model, list(by_reader)):
        records = walk_blocks(
            model, tokens, edit, list(by_reader), walk=replace(walk, store=store),
            held_out_every=held_out, dense_target=settings.alpha > 0,
        )  # fmt: skip
    ordered = [
        replace(by_reader[record["layer"]], order=tuple(record["order"]), errors=tuple(record["errors"])) for record in records
    ]
    return Database(model, ordered, store.folder)


@contextmanager
def _left_as_it_is(model: BlockModel, names: Sequence[str]) -> Iterator[None]:
    """Gives the named layers of a model in memory their parameters back in the end."""
    layers = [model.network.get_submodule(name) for name in names if model.checkpoint is None]
    before = [{name: parameter.detach().clone() for name, parameter in layer.named_parameters()} for layer in layers]
    try:
        yield
    finally:
        for layer, parameters in zip(layers, before, strict=True):
            layer.load_state_dict(parameters)


def _find_levels(
    layer: Layer, *, module: Module, stage: Stage, share: float, alpha: float, store: _LevelStore
) -> dict[str, Any]:
    """Orders the units of one layer, keeps its levels, and leaves it at the level that is nearest to the share."""
    start, weight, factor, units = time.perf_counter(), layer.read(), stage.options["factor"], module.units
    wanted = aim(weight, stage, alpha).to(factor.hessian.dtype)
    size = weight.shape[1] // units.count
    per_round = max(1, units.count // ROUNDS) if units.kind == "ffn_channel" else 1
    order, _ = greedy_order(wanted, factor.inverse, size=size, per_round=per_round)
    energy, lower = level_factor(wanted, factor.hessian, units.columns(order))
    whole = max(output_error(weight, torch.zeros_like(weight), stage.statistics.total.second), 1e-30)
    curve = error_curve(energy) / whole
    here = module.nearest(share)
    for level, kept in enumerate(module.grid[:-1]):
        if kept:
            part = level_weight(energy, lower, kept * size).to(weight.dtype)
            full = _spread(part, units, order, kept) if level == here or stage.with_bias else None
            bias = corrected_bias(layer, full, stage.statistics, alpha) if full is not None and stage.with_bias else None
            store.keep(units, level, part, bias)
            if full is not None and level == here:
                layer.write(full, bias=bias)
    errors = [float(curve[kept * size]) if kept else 1.0 for kept in module.grid]
    found = {"order": order, "errors": errors, "relative_error": errors[here], "seconds": time.perf_counter() - start}
    return found | {"damping": factor.damping} | stage.report


def _least(layer: Layer, statistics: Statistics, units: Units, share: float) -> Tensor:
    """The columns of the units of least output, without regard to the others: what is cut while dampings are compared."""
    energy = layer.read().float().square().sum(0) * statistics.total.second.diagonal().float()
    scores = energy[units.columns(range(units.count))].reshape(units.count, -1).sum(1)
    gone = scores.argsort(stable=True)[: max(1, round((1 - share) * units.count))]
    return units.columns(sorted(gone.tolist()))


def level_file(folder: Path, block: int) -> Path:
    """The levels of one block."""
    return folder / f"levels-{block:04d}.safetensors"


class _LevelStore(BlockStore):
    """Keeps the readers of finished blocks as the next ones see them, and beside them all levels."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "levels", lambda name: name)
        self.pending: dict[str, Tensor] = {}

    def keep(self, units: Units, level: int, part: Tensor, bias: Tensor | None) -> None:
        """Takes one level of the open block."""
        self.pending[f"{units.kind}.{level}.weight"] = part.contiguous()
        if bias is not None:
            self.pending[f"{units.kind}.{level}.bias"] = bias

    def save(self, index: int, block: Finished) -> None:
        """Writes the levels of a finished block; its record, written last, makes it count."""
        write_tensors(level_file(self.folder, index), self.pending)
        layers = tuple(f"{record['layer']}." for record in block.records)
        own = {name: tensor for name, tensor in block.tensors.items() if name.startswith(layers)}
        super().save(index, replace(block, tensors=own))
        self.pending = {}
