"""What a candidate costs, module by module, and how it is brought inside its limits.

Every cost is a sum over the modules of what their level costs, and a rest that no level changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor

from duramen.calibrate import ranks
from duramen.calibrate.walker import Memo, set_aside
from duramen.families import OWN
from duramen.families.model import BlockModel
from duramen.problem import Problem
from duramen.search.database import Genome, Module
from duramen.search.latency import prefill_costs
from duramen.shrink.groups import Units
from duramen.shrink.model import RepairSettings
from duramen.shrink.surgery import part_children

Resource = Literal["parameters", "block_parameters", "bytes", "macs", "kv_bytes", "latency"]


class BudgetSettings(RepairSettings):
    """What every search takes: how much may be left, on what candidates are compared, and how the winner is repaired."""

    target: Annotated[dict[Resource, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    """What may be left: `parameters`, `block_parameters`, `bytes`, `macs` (of matrices, per token), `kv_bytes` (per token) or `latency` (milliseconds of a prefill of 256 tokens, measured on this machine), as a share of the dense model's or, above 1, as a number; all of several hold."""
    bits: Annotated[float, Field(gt=0, le=32)] = 16
    """Of a weight inside the blocks, for `bytes`."""
    search_share: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Share of the calibration sequences on which candidates are compared; what is fitted is fitted to the others."""
    seed: int = 0
    """Of mutations, and of the sequences on which candidates are compared."""

    @model_validator(mode="after")
    def _no_zeros_in_gaps(self) -> BudgetSettings:
        if self.homogenise:
            raise Problem(
                "`homogenise` undoes a search.",
                why="zeros fill what was cut, and the limit no longer holds.",
                fix="`fusion` with `allocation: local`, which gives one shape to all blocks.",
            )
        return self


def split(tokens: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Calibration sequences for fitting, and those set apart for comparing candidates.

    Raises:
        Problem: If there are too few.
    """
    aside = set_aside(len(tokens), share, "search_share")
    return tokens[~aside], tokens[aside]


@dataclass(frozen=True)
class Limit:
    """At most so much of one resource.

    Attributes:
        resource: Which one.
        rest: What no level changes.
        table: What every level of every module costs.
        most: The limit.
    """

    resource: str
    rest: float
    table: tuple[tuple[float, ...], ...]
    most: float

    def cost(self, genome: Genome) -> float:
        """Of a candidate."""
        return self.rest + sum(levels[level] for levels, level in zip(self.table, genome, strict=True))

    @property
    def whole(self) -> float:
        """Of the dense model."""
        return self.rest + sum(levels[-1] for levels in self.table)


def limits(
    model: BlockModel,
    modules: Sequence[Module],
    target: Mapping[Resource, float],
    *,
    bits: float,
    memo: Memo = lambda name, compute: compute(),
) -> list[Limit]:
    """The limits that a target sets.

    Args:
        model: The dense model.
        modules: What the search may cut.
        target: Resource -> share of the dense model's, up to 1, or more than 1 for an absolute number.
        bits: Of a weight inside the blocks, for ``bytes``; weights outside count as 16.
        memo: Keeps what was measured for ``latency``.

    Raises:
        Problem: If a limit is out of reach, or the time of a prefill cannot be measured.
    """
    found = []
    for resource, wanted in target.items():
        if resource == "latency":
            measured = memo("latency", lambda: ranks.led(lambda: prefill_costs(model, modules)))
            rest, table = measured["rest"], tuple(map(tuple, measured["table"]))
        else:
            rest, table = _costs(model, modules, resource, bits)
        whole = rest + sum(levels[-1] for levels in table)
        least = rest + sum(min(levels) for levels in table)
        most = wanted * whole if wanted <= 1 else wanted
        if most < least:
            raise Problem(
                f"{most:,.0f} {resource} are wanted, and the least that can be is {least:,.0f}, of {whole:,.0f}.",
                why="everything that may be cut is cut then; the rest stays.",
                fix=f"`target: {{{resource}: {-(-least * 1000 // whole) / 1000:g}}}` or more, more `families`, or `off: true`.",
            )
        found.append(Limit(resource, rest, table, most))
    return found


def costs_of(bounds: Sequence[Limit], genome: Genome) -> dict[str, dict[str, float]]:
    """What a candidate costs of every limited resource, beside the dense model and the limit."""
    return {limit.resource: {"dense": limit.whole, "most": limit.most, "winner": limit.cost(genome)} for limit in bounds}


def expected_share(bounds: Sequence[Limit]) -> float:
    """About the share of the units that stays: what the tightest limit leaves of all that can be cut."""
    return min(min(1.0, (limit.most - limit.rest) / max(limit.whole - limit.rest, 1e-30)) for limit in bounds)


def _costs(
    model: BlockModel, modules: Sequence[Module], resource: str, bits: float
) -> tuple[float, tuple[tuple[float, ...], ...]]:
    """What no level changes, and what every level of every module costs."""
    if resource == "kv_bytes":
        return _cache_costs(model, modules)
    matrices = resource == "macs"
    scale = bits / 8 if resource == "bytes" else 1.0
    table = []
    for module in modules:
        units, part, unit = module.units, _part(model, module, matrices=matrices), _unit(model, module.units, matrices=matrices)
        table.append(tuple(scale * (part - unit * (units.count - kept)) if kept else 0.0 for kept in module.grid))
    start = f"{model.family.blocks}."
    inside = sum(p.numel() for name, p in model.network.named_parameters() if name.startswith(start) and _counts(p, matrices))
    around = {"block_parameters": 0.0, "bytes": 2.0}.get(resource, 1.0) * _outside(model, matrices=matrices)
    return scale * inside - sum(levels[-1] for levels in table) + around, tuple(table)


def _cache_costs(model: BlockModel, modules: Sequence[Module]) -> tuple[float, tuple[tuple[float, ...], ...]]:
    """The same of the cache: a key and a value of 16 bits in every KV group, per token."""
    groups = {m.units.block: m for m in modules if m.units.kind == "kv_group"}
    rest = sum(
        4 * sizes.head * sizes.groups
        for index in range(len(model.blocks))
        if index not in groups and "attention" not in model.left(index)
        for sizes in [model.sizes(index)]
    )
    widths = [4 * m.units.sizes.head if m.units.kind == "kv_group" else 0 for m in modules]
    return float(rest), tuple(tuple(float(width * kept) for kept in m.grid) for width, m in zip(widths, modules, strict=True))


def _counts(tensor: Tensor, matrices: bool) -> bool:
    return tensor.ndim == 2 or not matrices


def _outside(model: BlockModel, *, matrices: bool) -> int:
    """Entries outside the blocks; of matrices only the head is multiplied by."""
    if matrices:
        head = model.network.get_output_embeddings()  # type: ignore[operator]
        return 0 if head is None else head.weight.numel()
    start = f"{model.family.blocks}."
    return sum(parameter.numel() for name, parameter in model.network.named_parameters() if not name.startswith(start))


def _part(model: BlockModel, module: Module, *, matrices: bool) -> int:
    """Entries of all that leaves when a module is off."""
    base = str(model.config.model_type).removeprefix(OWN)
    block = model.blocks[module.units.block]
    tensors = [p for child in part_children(base, module.units.part) for p in block.get_submodule(child).parameters()]
    return sum(tensor.numel() for tensor in tensors if _counts(tensor, matrices))


def _unit(model: BlockModel, units: Units, *, matrices: bool) -> int:
    """Entries of one unit."""
    block = dict(model.blocks[units.block].named_parameters())
    members = [(member, block[member.path]) for member in units.members if _counts(block[member.path], matrices)]
    return sum(tensor.numel() // tensor.shape[member.axis] * member.size(units.sizes) for member, tensor in members)


def repair(genome: Genome, bounds: Sequence[Limit], losses: Sequence[Sequence[float]], modules: Sequence[Module]) -> Genome:
    """The candidate brought inside its limits by the cheapest single steps, and filled up again as far as they allow.

    Args:
        genome: A candidate.
        bounds: The limits.
        losses: What each level of each module is thought to lose.
        modules: Of the search.
    """
    levels = list(genome)

    def step(number: int, by: int) -> float:
        return losses[number][levels[number] + by] - losses[number][levels[number]]

    while over := [limit for limit in bounds if limit.cost(tuple(levels)) > limit.most]:
        table = over[0].table
        saved = {
            number: table[number][level] - table[number][level - 1]
            for number, level in enumerate(levels)
            if level > 0 and table[number][level] > table[number][level - 1]
        }
        best = min(saved, key=lambda number: (step(number, -1) / saved[number], number))
        levels[best] -= 1
    while True:
        costs = [limit.cost(tuple(levels)) for limit in bounds]
        fits = [
            number
            for number, module in enumerate(modules)
            if (now := levels[number]) < module.full
            and all(
                cost + limit.table[number][now + 1] - limit.table[number][now] <= limit.most
                for limit, cost in zip(bounds, costs, strict=True)
            )
        ]
        if not fits:
            return tuple(levels)
        best = min(fits, key=lambda number: (step(number, 1) / modules[number].units.parameters, number))
        levels[best] += 1
