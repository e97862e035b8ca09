"""One point of a finished search: another of its sub-networks, or the same with another repair."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from duramen.calibrate.statistics import Statistics
from duramen.calibrate.walker import Records, Walk, walk_blocks
from duramen.families.model import BlockModel, Layer, Model
from duramen.problem import Exit, Problem
from duramen.registry import Place, method
from duramen.search.database import Genome, Module, plan_of, restore
from duramen.search.nested import NESTED, levels_of, read_header, reader
from duramen.shrink.model import RepairSettings, carry_out
from duramen.shrink.plan import Plan, digest
from duramen.shrink.surgery import Surgery, homogenised, masked

SEARCH = "search.json"
FORMAT = "duramen-search/1"


class Settings(RepairSettings):
    """Settings of a point of a search."""

    search: Place
    """Path of the `search.json` of a finished search, or of its `nested.safetensors`, whose weights are taken as they are."""
    point: int = Field(ge=0)
    """Which point of its front, from 0; the report lists them."""

    @property
    def nested(self) -> bool:
        """Whether the weights of the levels are in the file."""
        return Path(self.search).suffix == Path(NESTED).suffix


def read(file: Path) -> dict[str, Any]:
    """What a finished search has written; empty if the file is none."""
    if file.suffix == Path(NESTED).suffix:
        return read_header(file)
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("format") == FORMAT else {}


def chosen_point(model: BlockModel, settings: Settings) -> tuple[Plan, list[Module], Genome]:
    """The plan of the point, the modules of the search, and their levels.

    Raises:
        Problem: If there is no such search or point, or the search is of a model with other tensors.
    """
    file = Path(settings.search)
    found = read(file)
    levels = levels_of(found, settings.point, file)
    if found["base"] != digest(model):
        raise Problem(
            f"The search {file} is of another model: it is for tensors {found['base']}, and these are {digest(model)}.",
            why="its orders mean other channels and heads here, or none.",
            fix="the model that was searched, or one with the same names and shapes of all tensors.",
            code=Exit.INCOMPATIBLE,
        )
    modules = restore(model, found["modules"])
    made_by = {"method": "subnet", "settings": settings.model_dump(mode="json")}
    return plan_of(model, modules, levels, made_by), modules, levels


@method("subnet", title="A point of a search", paper="documented in search/", kind="search", settings=Settings)
def apply(model: Model, tokens: Tensor, *, walk: Walk | None = None, **settings: object) -> Records:
    """Cuts a model to one point of a finished search; see ``chosen_point`` and ``carry_out``."""
    chosen, walk = Settings.model_validate(settings), walk or Walk()
    blocks = BlockModel.of(model)
    plan, modules, levels = chosen_point(blocks, chosen)
    if chosen.nested:
        return _take(blocks, tokens, walk, plan, modules, levels, chosen)
    return carry_out(plan, blocks, tokens, chosen, walk, [module.units for module in modules])


def _take(
    model: BlockModel, tokens: Tensor, walk: Walk, plan: Plan, modules: list[Module], levels: Genome, settings: Settings
) -> Records:
    """The readers as the nested checkpoint has them."""
    narrowed = {
        module.units.reader: (module, level)
        for module, level in zip(modules, levels, strict=True)
        if module.grid[level] and level != module.full
    }

    def edit(layers: list[Layer], statistics: Statistics) -> Callable[[Layer], dict[str, Any]]:
        def take(layer: Layer) -> dict[str, Any]:
            module, level = narrowed[layer.name]
            weight, bias = reader(Path(settings.search), module, level)
            layer.write(weight, bias=bias)
            return {
                "removed": int((weight == 0).sum()),
                "size": weight.numel(),
                "relative_error": module.errors[level],
                "seconds": 0.0,
            }

        return take

    walk.reshape = Surgery(model, homogenised(model, plan) if settings.homogenise else plan)
    if not narrowed and walk.store is None:
        return []
    with masked(model, Plan(plan.base, plan.blocks, skipped=plan.skipped)):
        return walk_blocks(model, tokens, edit, list(narrowed), walk=walk)
