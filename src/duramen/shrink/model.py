"""Cuts units out of a model: scores them, chooses by a budget, repairs what reads them, and hands the shapes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from duramen.calibrate.statistics import Statistics
from duramen.calibrate.walker import Records, Walk, walk_blocks
from duramen.families.model import BlockModel, Layer, Model
from duramen.families.select import filter_layers
from duramen.problem import Problem
from duramen.prune.layer import GRID, Damping, DampingGrid, HeldOut, prepare, prune_layer
from duramen.registry import Settings
from duramen.shrink.allocate import Allocation, Gone, Scores, allocate
from duramen.shrink.groups import Kind, Units, find_units
from duramen.shrink.plan import Plan, digest
from duramen.shrink.reform import Repair, reform
from duramen.shrink.surgery import Surgery, homogenised, masked


class ChoiceSettings(Settings):
    """What and how much may go."""

    ratio: float = Field(ge=0, lt=1)
    """Share to remove."""
    ratio_of: Literal["parameters", "block_parameters", "units"] = "parameters"
    """Of what: all parameters of the model, those of its blocks, or the units of every block."""
    families: tuple[Kind, ...] = ("ffn_channel",)
    """Units that may go: FFN channels, and KV groups with their query heads, or else one query head of every KV group."""
    only: tuple[str, ...] = ()
    """Projections that read the units that may go, by role (`down`), block range (`blocks:4-27`) or glob; empty means all."""
    skip: tuple[str, ...] = ()
    """Projections whose units stay, in the same words."""
    allocation: Allocation = "local"
    """The same share in every block, the least important of the whole model (`global`), or that after standardising (`flap`)."""
    round_to: int = Field(default=64, ge=1)
    """FFN widths become multiples of it."""
    minimum: int = Field(default=32, ge=1)
    """Least FFN width; one KV group always stays."""

    @field_validator("families")
    @classmethod
    def _once(cls, value: tuple[Kind, ...]) -> tuple[Kind, ...]:
        return tuple(dict.fromkeys(value))

    @model_validator(mode="after")
    def _one_kind_of_heads(self) -> ChoiceSettings:
        if {"kv_group", "query_head"} <= set(self.families):
            raise Problem(
                "`families` has both kv_group and query_head.",
                why="a query head that goes with its KV group cannot be counted again.",
                fix="two steps, one with each.",
            )
        return self


class RepairSettings(Settings):
    """What makes up for a cut."""

    repair: Repair = "affine"
    """What makes up for the cut in the projections that read it: their bias, their other columns (`reform`), both, or nothing."""
    damping: Damping = "held-out"
    """λ of the repair as a share of the mean diagonal of the Gram; `held-out` chooses it on held-out sequences."""
    dense_target: Annotated[float, Field(ge=0, le=1)] = 0.25
    """0 repairs each layer alone; 1 fits the output of the dense model."""
    held_out: HeldOut = 0.125
    """Share of the calibration sequences that are held out where `damping: held-out` needs them."""
    damping_grid: DampingGrid = GRID
    """Candidates for `damping: held-out`."""
    homogenise: bool = False
    """Whether to fill narrow blocks with zeros, so that the stock class opens the result."""

    @property
    def alpha(self) -> float:
        """α of the target."""
        return self.dense_target if self.solves else 0.0

    @property
    def solves(self) -> bool:
        """Whether columns move in the repair."""
        return self.repair in ("reform", "affine")

    @property
    def bias(self) -> str:
        """Whether biases make up for mean changes, where there are any."""
        return "auto" if self.repair in ("bias", "affine") else "off"

    @property
    def options(self) -> dict[str, Any]:
        """What goes to ``reform``."""
        return {"solve": self.solves}

    @property
    def trial(self) -> dict[str, Any]:
        """Dampings are compared as they are used."""
        return {}

    @property
    def undoes(self) -> tuple[str, ...]:
        """See ``duramen.order``."""
        return ("pattern", "codes", "reduction")


class ShrinkSettings(RepairSettings, ChoiceSettings):
    """What every method takes that cuts units."""


Score = Callable[[BlockModel, list[Units], Tensor, Walk], tuple[Scores, dict[str, Any]]]
"""(model, units, tokens, walk) -> importance by (block, kind), and what to say of it in the plan."""


def shrink_model(
    score: Score, name: str, model: Model, tokens: Tensor, settings: ShrinkSettings, *, walk: Walk | None = None
) -> Records:
    """Scores the units of a model, chooses, and carries the plan out; see ``carry_out``.

    Args:
        score: The method's importance.
        name: The method's name, for the plan.
        model: A loaded transformers model or a ``BlockModel``.
        tokens: Calibration token ids, [S, T].
        settings: The method's settings.
        walk: How to walk; None for the defaults.

    Returns:
        One record per projection that was repaired.

    Raises:
        Problem: On filters that match nothing, ratios out of reach, families without a table, values that are not finite.
    """
    blocks = BlockModel.of(model)
    walk = walk or Walk()
    units = _chosen(blocks, settings)
    plan = Plan.from_json(walk.memo("plan", lambda: _plan(score, name, blocks, units, tokens, settings, walk).to_json()))
    return carry_out(plan, blocks, tokens, settings, walk, units)


def carry_out(
    plan: Plan,
    blocks: BlockModel,
    tokens: Tensor,
    settings: RepairSettings,
    walk: Walk,
    units: list[Units] | None = None,
) -> Records:
    """Cuts what a plan says, and repairs what reads it.

    The blocks are edited in full width, zeros standing where units go; ``walk.reshape`` then gives them their new shapes. A model in
    memory keeps its shapes; ``surgery.shrunk`` with ``walk.reshape.plan`` makes the smaller one.

    Args:
        plan: What stays.
        blocks: The model.
        tokens: Calibration token ids, [S, T].
        settings: How to repair.
        walk: How to walk.
        units: The units whose readers are repaired, if their part stays; None for all of the kinds in the plan.

    Returns:
        One record per projection that was repaired.
    """
    every = find_units(blocks, tuple(plan.kept)) if units is None else units
    units = [each for each in every if each.block not in plan.dropped and each.part not in plan.skipped.get(each.block, ())]
    walk.reshape = Surgery(blocks, homogenised(blocks, plan) if settings.homogenise else plan)
    readers: dict[str, list[Units]] = {}
    for each in units:
        readers.setdefault(each.reader, []).append(each)
    intact = not any(each.others(plan.stay(each)) for each in units)
    chosen = settings if settings.solves else settings.model_copy(update={"damping": None})

    def edit(layers: list[Layer], statistics: Statistics) -> Callable[[Layer], dict[str, Any]]:
        layer = layers[0]
        if intact:
            return lambda layer: {"removed": 0, "size": layer.read().numel(), "relative_error": 0.0, "seconds": 0.0}
        gone = [each.columns(each.others(plan.stay(each))) for each in readers[layer.name]]
        target = {"columns": torch.cat(gone)}
        stage = prepare(reform, layers, statistics, chosen, target)
        return lambda layer: prune_layer(reform, layer, stage, chosen, target)

    held_out = settings.solves and settings.damping == "held-out"
    with masked(blocks, Plan(plan.base, plan.blocks, skipped=plan.skipped, dropped=plan.dropped)):
        return walk_blocks(
            blocks, tokens, edit, list(readers), walk=walk,
            held_out_every=round(1 / settings.held_out) if held_out else 0, dense_target=settings.alpha > 0,
        )  # fmt: skip


def _chosen(model: BlockModel, settings: ShrinkSettings) -> list[Units]:
    """The units that may go."""
    units = find_units(model, settings.families)
    roles = model.layer_names()
    names = {each.reader: roles[each.reader] for each in units}
    kept = set(filter_layers(names, settings.only, settings.skip))
    return [each for each in units if each.reader in kept]


def _plan(
    score: Score, name: str, model: BlockModel, units: list[Units], tokens: Tensor, settings: ShrinkSettings, walk: Walk
) -> Plan:
    """Scores the units and chooses."""
    size, wanted = budget(model, units, settings)
    scores, report = score(model, units, tokens, replace(walk, store=None)) if wanted else ({}, {})
    gone = choose(units, scores, wanted, settings) if wanted else {}
    plan = Plan(digest(model), len(model.blocks), kept_units(model, units, gone))
    removed = sum(len(units_gone) * each.parameters for each in units if (units_gone := gone.get((each.block, each.kind))))
    made_by = {"method": name, "settings": settings.model_dump(mode="json"), "ratio": removed / size, "removed": removed}
    return replace(plan, made_by=made_by | report)


def budget(model: BlockModel, units: list[Units], settings: ShrinkSettings) -> tuple[int, float]:
    """How many parameters the ratio is of, and how many are to go."""
    inside = f"{model.family.blocks}."
    if settings.ratio_of == "units":
        size = sum(each.count * each.parameters for each in units)
    else:
        everything = settings.ratio_of == "parameters"
        named = model.network.named_parameters()
        size = sum(parameter.numel() for name, parameter in named if everything or name.startswith(inside))
    return size, settings.ratio * size


def choose(units: list[Units], scores: Scores, wanted: float, settings: ShrinkSettings) -> Gone:
    """The units that go, by (block, kind)."""
    slots = {(each.block, each.kind): _by_slot(each, scores[each.block, each.kind]) for each in units}
    gone = allocate(
        [each.slots for each in units], slots, wanted,
        allocation=settings.allocation, round_to=settings.round_to, minimum=settings.minimum,
    )  # fmt: skip
    for each in units:
        if each.kind == "query_head":
            least = scores[each.block, each.kind].reshape(each.sizes.groups, -1).argsort(dim=1, stable=True)
            heads = least[:, : len(gone[each.block, each.kind])] + torch.arange(each.sizes.groups)[:, None] * least.shape[1]
            gone[each.block, each.kind] = sorted(heads.flatten().tolist())
    return gone


def _by_slot(units: Units, scores: Tensor) -> Tensor:
    """Of query heads: what the least important head of every group costs together, then the second, and so on."""
    return scores.reshape(units.sizes.groups, -1).sort(1).values.sum(0) if units.kind == "query_head" else scores


def kept_units(model: BlockModel, units: list[Units], gone: Gone) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Kind -> for every block the units that stay."""
    kinds = {each.kind: None for each in units}
    kept: dict[str, list[tuple[int, ...]]] = {kind: [() for _ in model.blocks] for kind in kinds}
    for each in find_units(model, tuple(kinds)):
        kept[each.kind][each.block] = tuple(each.others(gone.get((each.block, each.kind), ())))
    return {kind: tuple(blocks) for kind, blocks in kept.items()}


def predicted(model: BlockModel, settings: ShrinkSettings) -> Surgery:
    """What the ratio comes to, before any score is known: counts are those of ``local``, which units they are is open."""
    units = _chosen(model, settings)
    _, wanted = budget(model, units, settings)
    equal = {(each.block, each.kind): torch.zeros(each.count) for each in units}
    local = settings.model_copy(update={"allocation": "local"})
    plan = Plan(digest(model), len(model.blocks), kept_units(model, units, choose(units, equal, wanted, local)))
    return Surgery(model, homogenised(model, plan) if settings.homogenise else plan)
