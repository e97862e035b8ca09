"""A plan says what stays of a model: the kept units of every block, the parts that are skipped, the blocks that are dropped.

It is all that is needed beside the dense weights, and is saved as ``pruning_plan.json``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from duramen.families.model import BlockModel
from duramen.problem import Problem
from duramen.reading import reading
from duramen.shrink.groups import Units

PLAN = "pruning_plan.json"
FORMAT = "duramen-plan/1"
Kept = Mapping[str, tuple[tuple[int, ...], ...]]
"""Kind -> for every block the units, sorted."""


@dataclass(frozen=True)
class Plan:
    """What stays.

    Attributes:
        base: Digest of the model that the plan is for.
        blocks: How many blocks it has.
        kept: The units that stay, for every kind that was touched.
        fill: Removed units whose places stay, filled with zeros, so that all blocks get one shape.
        skipped: Block -> the parts (``attention``, ``mlp``) that it no longer has.
        dropped: Blocks that leave as a whole.
        made_by: Method, settings, ratios asked and reached.
    """

    base: str
    blocks: int
    kept: Kept = field(default_factory=dict)
    fill: Kept = field(default_factory=dict)
    skipped: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    dropped: tuple[int, ...] = ()
    made_by: Mapping[str, Any] = field(default_factory=dict)

    def stay(self, units: Units) -> list[int]:
        """The units of one kind and block that stay, sorted."""
        return list(self.kept[units.kind][units.block]) if units.kind in self.kept else list(range(units.count))

    def places(self, units: Units) -> list[int]:
        """The units that have a place afterwards: those that stay, and those that are filled with zeros."""
        fill = self.fill[units.kind][units.block] if units.kind in self.fill else ()
        return sorted({*self.stay(units), *fill})

    def then(self, later: Plan) -> Plan:
        """This plan and then one of what it left, as one plan of the first model."""
        stayed = [block for block in range(self.blocks) if block not in self.dropped]
        kept, fill = {}, {}
        for kind in {**self.kept, **later.kept}:
            found = [self._after(kind, old, later, stayed.index(old) if old in stayed else None) for old in range(self.blocks)]
            kept[kind], fill[kind] = tuple(stay for stay, _ in found), tuple(zeros for _, zeros in found)
        skipped = dict(self.skipped)
        for new, parts in later.skipped.items():
            skipped[stayed[new]] = tuple(sorted({*skipped.get(stayed[new], ()), *parts}))
        dropped = (*self.dropped, *(stayed[new] for new in later.dropped))
        fill = {kind: blocks for kind, blocks in fill.items() if any(blocks)}
        return Plan(self.base, self.blocks, kept, fill, skipped, dropped, later.made_by)

    def _after(self, kind: str, old: int, later: Plan, new: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The units of one block that stay, and those that are filled, after both plans."""
        mine = self.kept[kind][old] if kind in self.kept else None
        zeros = self.fill[kind][old] if kind in self.fill else ()
        if new is None or kind not in later.kept:
            return mine or (), zeros
        more = later.fill[kind][new] if kind in later.fill else ()
        if mine is None:
            return later.kept[kind][new], more
        places = sorted({*mine, *zeros})
        stay = {places[unit] for unit in later.kept[kind][new]} & set(mine)
        left = {places[unit] for unit in (*later.kept[kind][new], *more)}
        return tuple(sorted(stay)), tuple(sorted(left - stay))

    def to_json(self) -> str:
        """The plan as written to ``pruning_plan.json``."""
        return json.dumps({"format": FORMAT} | asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Reads a plan.

        Raises:
            Problem: If the text is no plan.
        """
        try:
            found = json.loads(text)
        except ValueError:
            found = {}
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise Problem(
                "This is no pruning plan.",
                why=f"its `format` is not {FORMAT}.",
                fix=f"the file {PLAN} of a run of a `shrink` method.",
            )
        kept, fill = (
            {kind: tuple(tuple(units) for units in blocks) for kind, blocks in found[name].items()} for name in ("kept", "fill")
        )
        skipped = {int(block): tuple(parts) for block, parts in found["skipped"].items()}
        return cls(found["base"], found["blocks"], kept, fill, skipped, tuple(found["dropped"]), found["made_by"])

    @classmethod
    def load(cls, file: Path) -> Plan:
        """Reads ``pruning_plan.json``.

        Raises:
            Problem: If there is none.
        """
        if not file.is_file():
            raise Problem(
                f"There is no plan {file}.", why="the path leads nowhere.", fix=f"`OUT/{PLAN}` of a run that cut units."
            )
        with reading(file):
            return cls.from_json(file.read_text(encoding="utf-8"))


def digest(model: BlockModel) -> str:
    """Of the names and shapes of a model's tensors: a plan fits every model that has the same, such as a tuned sibling."""
    shapes = sorted((name, tuple(tensor.shape)) for name, tensor in model.network.state_dict().items())
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]
