"""Cuts what a saved plan says, and repairs the rest: for a sibling of the model that was scored, or to try another repair."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from duramen.calibrate.walker import Records, Walk
from duramen.families.model import BlockModel, Model
from duramen.problem import Exit, Problem
from duramen.registry import Place, method
from duramen.shrink.model import RepairSettings, carry_out
from duramen.shrink.plan import Plan, digest


class Settings(RepairSettings):
    """Settings of a saved plan."""

    plan: Place
    """Path of a `pruning_plan.json`."""


def fitting(model: BlockModel, settings: Settings) -> Plan:
    """The plan, if it fits the model.

    Raises:
        Problem: If there is no such plan, or it is of a model with other tensors.
    """
    plan = Plan.load(Path(settings.plan))
    if plan.base != digest(model):
        raise Problem(
            f"The plan {settings.plan} is of another model: it is for tensors {plan.base}, and these are {digest(model)}.",
            why="its indices mean other channels and heads here, or none.",
            fix="a plan that was made for this architecture and size; the digest is of the names and shapes of all tensors.",
            code=Exit.INCOMPATIBLE,
        )
    return plan


@method("cut", title="A saved plan", paper="documented in shrink/", kind="shrink", settings=Settings)
def apply(model: Model, tokens: Tensor, *, walk: Walk | None = None, **settings: object) -> Records:
    """Cuts what the plan says; see ``fitting`` and ``carry_out``."""
    chosen = Settings.model_validate(settings)
    blocks = BlockModel.of(model)
    plan = fitting(blocks, chosen)
    return carry_out(plan, blocks, tokens, chosen, walk or Walk())
