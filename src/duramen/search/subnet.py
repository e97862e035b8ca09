"""One point of a finished search: another of its sub-networks, or the same with another repair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from duramen.calibrate.walker import Records, Walk
from duramen.families.model import BlockModel, Model
from duramen.problem import Exit, Problem
from duramen.registry import method
from duramen.search.database import Genome, Module, plan_of
from duramen.shrink.groups import Units, find_units
from duramen.shrink.model import RepairSettings, carry_out
from duramen.shrink.plan import Plan, digest

SEARCH = "search.json"
FORMAT = "duramen-search/1"


class Settings(RepairSettings):
    """Settings of a point of a search."""

    search: str
    """Path of the `search.json` of a finished search."""
    point: int = Field(ge=0)
    """Which point of its front, from 0; the report lists them."""


def read(file: Path, model: BlockModel) -> tuple[list[Module], list[dict[str, Any]]]:
    """The modules and the front of a finished search.

    Raises:
        Problem: If there is no such search, or it is of a model with other tensors.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    if found.get("format") != FORMAT:
        raise Problem(
            f"{file} is no finished search.",
            why="there is no such file, or its format is another one.",
            fix=f"`OUT/{SEARCH}` of a run with a step `search`.",
        )
    if found["base"] != digest(model):
        raise Problem(
            f"The search {file} is of another model: it is for tensors {found['base']}, and these are {digest(model)}.",
            why="its orders mean other channels and heads here, or none.",
            fix="the model that was searched, or one with the same names and shapes of all tensors.",
            code=Exit.INCOMPATIBLE,
        )
    kinds = dict.fromkeys(item["kind"] for item in found["modules"])
    units: dict[tuple[int, str], Units] = {(each.block, each.kind): each for each in find_units(model, tuple(kinds))}
    modules = [
        Module(units[item["block"], item["kind"]], tuple(item["kept"]), tuple(item["order"]), tuple(item["errors"]))
        for item in found["modules"]
    ]
    return modules, found["front"]


def chosen_plan(model: BlockModel, settings: Settings) -> tuple[Plan, list[Module]]:
    """The plan of the point, and the modules of the search.

    Raises:
        Problem: If there is no such point.
    """
    modules, front = read(Path(settings.search), model)
    if settings.point >= len(front):
        raise Problem(
            f"The front has {len(front)} points, and point {settings.point} is wanted.",
            why="they are counted from 0.",
            fix=f"`point: {len(front) - 1}` or less.",
        )
    levels: Genome = tuple(front[settings.point]["levels"])
    made_by = {"method": "subnet", "settings": settings.model_dump(mode="json")}
    return plan_of(model, modules, levels, made_by), modules


@method(
    "subnet", title="A point of a search", paper="documented in search/", kind="search", needs=("tokens",), settings=Settings
)
def apply(model: Model, tokens: Tensor, *, walk: Walk | None = None, **settings: object) -> Records:
    """Cuts a model to one point of a finished search; see ``chosen_plan`` and ``carry_out``."""
    chosen = Settings.model_validate(settings)
    blocks = BlockModel.of(model)
    plan, modules = chosen_plan(blocks, chosen)
    return carry_out(plan, blocks, tokens, chosen, walk or Walk(), [module.units for module in modules])
