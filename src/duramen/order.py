"""Which step may follow which: a step says what it leaves in a model and what it would undo, and nothing that was left is undone.

The marks are ``zeros`` (weights that were removed), ``pattern`` (N:M among them), ``codes`` (numbers on a grid), ``rounding`` (of inputs, keys or values, as the model runs) and ``reduction`` (prompts that get shorter inside). A step that
would undo one has its place before the step that leaves it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from duramen.problem import Exit, Problem
from duramen.recipe import Step
from duramen.rundir import CODES, FORMATS, MASKS, read_formats
from duramen.tokens.folder import FILE

WHY = {
    "zeros": "it mixes all weights, and the removed ones would be filled",
    "pattern": "whole columns leave, and the others no longer stand in the groups in which N of M are zero",
    "codes": "weights that are whole numbers of a step get other values, and the model is no longer a rounded one",
    "rounding": "it changes what layers read, and that is rounded already",
    "reduction": "it sees whole prompts, and the model that was measured reads shorter ones",
}
IN_A_FOLDER = {MASKS: "zeros", CODES: "codes", FILE: "reduction"}
"""Files that say what a model holds."""


def marks_of(folder: Path) -> dict[str, str]:
    """What an earlier run left in a model folder, each with what is said of it."""
    marks = {mark: f"the model itself ({file})" for file, mark in IN_A_FOLDER.items() if (folder / file).is_file()}
    rounds = any(each.runs for each in read_formats(folder).values())
    return marks | ({"rounding": f"the model itself ({FORMATS})"} if rounds else {})


def check_order(steps: Iterable[Step], there: Mapping[str, str] | None = None) -> None:
    """Refuses an order in which a step undoes what an earlier one, or the model, has.

    Args:
        steps: In order.
        there: What the model has already, by mark, each with what is said of it.

    Raises:
        Problem: At the first such step; it names both.
    """
    there = dict(there or {})
    left = dict(there)
    for step in steps:
        for mark in step.settings.undoes:
            if mark in left:
                raise Problem(
                    f"`{step.id}` cannot follow {left[mark]}.", why=f"{WHY[mark]}.",
                    fix="start from the model as it was before." if left[mark] == there.get(mark) else f"`{step.id}` before it.", code=Exit.INCOMPATIBLE,
                )  # fmt: skip
        left |= dict.fromkeys(step.settings.leaves, f"`{step.id}`")
