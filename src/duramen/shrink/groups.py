"""The units of a model that can be removed as a whole, as the family tables have them.

A unit is one FFN channel, one KV group with its query heads, or one query head in every KV group of a block (a query slot).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor

from duramen.families.model import BlockModel
from duramen.families.table import Group, Member, Sizes
from duramen.problem import Exit, Problem

Kind = Literal["ffn_channel", "kv_group", "query_head"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Units:
    """The units of one kind in one block.

    Attributes:
        block: Index of the block.
        group: Entry of the family's table.
        sizes: Widths of the block.
        members: Those of the table's tensors that the block has.
        parameters: Of one unit, in all its tensors.
        reader: Full name of the projection that reads the units.
        count: How many there are, U.
    """

    block: int
    group: Group
    sizes: Sizes
    members: tuple[Member, ...]
    parameters: int
    reader: str
    count: int

    @property
    def kind(self) -> str:
        """Kind of the units."""
        return self.group.kind

    @property
    def part(self) -> str:
        """The part of the block that is off when none of them stays."""
        return "mlp" if self.kind == "ffn_channel" else "attention"

    @property
    def slots(self) -> Units:
        """The same for a choice by block: query heads leave one from every KV group at a time."""
        if self.kind != "query_head":
            return self
        return replace(self, count=self.count // self.sizes.groups, parameters=self.parameters * self.sizes.groups)

    def others(self, units: Iterable[int]) -> list[int]:
        """All units but these, sorted."""
        return sorted(set(range(self.count)) - set(units))

    def columns(self, units: Sequence[int]) -> Tensor:
        """The reader's input columns that belong to these units, [n]."""
        return next(member.indices(self.sizes, units) for member in self.members if member.reads)

    def describe(self) -> dict[str, Any]:
        """For ``inspect --groups``."""
        return {
            "block": self.block, "kind": self.kind, "units": self.count, "parameters": self.parameters,
            "members": [f"{member.path}[{member.axis}] x{member.size(self.sizes)}" for member in self.members],
        }  # fmt: skip


def find_units(model: BlockModel, kinds: Sequence[str]) -> list[Units]:
    """All units of some kinds, block by block.

    Raises:
        Problem: If the family's table has no such group.
    """
    groups = {group.kind: group for group in model.family.groups}
    for kind in kinds:
        if kind not in groups:
            known = known_kinds(model)
            raise Problem(
                f"The family {model.family.name} has no table of {kind} units.",
                why=f"it has {', '.join(known)}." if known else "its table says which layers there are, not what is coupled.",
                fix=f"`families: [{', '.join(known)}]`." if known else "prune weights instead (`multiweight`), which needs no coupled groups.",
                code=Exit.INCOMPATIBLE,
            )  # fmt: skip
    return [
        units
        for block in range(len(model.blocks))
        for kind in kinds
        if (units := _units(model, block, groups[kind])) is not None
    ]


def known_kinds(model: BlockModel) -> list[str]:
    """The kinds of units that the family's table knows."""
    return [kind for kind in KINDS if any(group.kind == kind for group in model.family.groups)]


def _units(model: BlockModel, block: int, group: Group) -> Units | None:
    shapes = {name: tensor.shape for name, tensor in model.blocks[block].state_dict().items()}
    members = tuple(member for member in group.members if member.path in shapes)
    reader = next((member.path.rpartition(".")[0] for member in members if member.reads), None)
    if reader is None:
        return None
    sizes = model.sizes(block)
    parameters = sum(shapes[member.path].numel() // shapes[member.path][member.axis] * member.size(sizes) for member in members)
    return Units(block, group, sizes, members, parameters, f"{model.family.blocks}.{block}.{reader}", group.count(sizes))
