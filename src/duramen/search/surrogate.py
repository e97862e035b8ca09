"""What is thought of candidates before they are run: the sum over modules of what each loses alone.

The table is that of Puzzle (arXiv 2411.19146): KL with only this module at this level. It is measured at a few levels, and between them
follows the module's own error curve. The best candidate by that sum is a multiple-choice knapsack, which is solved exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from duramen.problem import Exit, Problem
from duramen.search.constraints import Limit
from duramen.search.database import Database, Genome, Module

PROBES = (0.25, 0.5)
"""Shares of the units at whose levels a module is measured alone, beside its lowest level."""
Table = tuple[tuple[float, ...], ...]
"""For every module what every level of it loses alone, in nats; 0 at the full level."""


def probed_levels(module: Module) -> list[int]:
    """The levels at which a module is measured, ascending; the full one is known."""
    chosen = {0, *(module.nearest(share) for share in PROBES)}
    return sorted(chosen - {module.full})


def single_module_table(database: Database, measure: Callable[[Sequence[Genome]], list[float]]) -> Table:
    """Measures every module alone at a few levels, and fills the table.

    Args:
        database: Levels of all modules.
        measure: Candidates -> their KL from the dense model.
    """
    trials = [(number, level) for number, module in enumerate(database.modules) for level in probed_levels(module)]
    full = database.full
    found = measure([(*full[:number], level, *full[number + 1 :]) for number, level in trials])
    measured: dict[int, dict[int, float]] = {}
    for (number, level), loss in zip(trials, found, strict=True):
        measured.setdefault(number, {})[level] = max(loss, 0.0)
    return tuple(filled(module, measured.get(number, {})) for number, module in enumerate(database.modules))


def filled(module: Module, measured: dict[int, float]) -> tuple[float, ...]:
    """What every level loses: measured, or between measured levels linear in the module's error; never less than a wider level."""
    known = sorted({module.full: 0.0, **measured}.items(), reverse=True)
    errors = np.array([module.errors[level] for level, _ in known])
    losses = np.maximum.accumulate([loss for _, loss in known])
    order = np.argsort(errors, kind="stable")
    return tuple(float(np.interp(error, errors[order], losses[order])) for error in module.errors)


def thought(table: Table, genome: Genome) -> float:
    """The sum over the modules."""
    return sum(levels[level] for levels, level in zip(table, genome, strict=True))


def solve(table: Table, bounds: Sequence[Limit]) -> Genome:
    """The candidate of least sum inside all limits, as an integer program with one choice per module.

    Raises:
        Problem: If no candidate is inside all limits.
    """
    sizes = [len(levels) for levels in table]
    starts = np.cumsum([0, *sizes])
    one_each = np.zeros((len(table), starts[-1]))
    for number, size in enumerate(sizes):
        one_each[number, starts[number] : starts[number] + size] = 1
    rules = [LinearConstraint(one_each, 1, 1)]
    for limit in bounds:
        scale = max(limit.whole, 1e-30)
        rules.append(LinearConstraint(np.concatenate(limit.table)[None] / scale, -np.inf, (limit.most - limit.rest) / scale))
    losses = np.concatenate(table)
    found = milp(losses / max(losses.max(), 1e-30), integrality=np.ones(len(losses)), bounds=Bounds(0, 1), constraints=rules)
    if found.x is None:
        raise Problem(
            f"No sub-network is inside all limits: {', '.join(f'{limit.resource} {limit.most:,.0f}' for limit in bounds)}.",
            why="each can be met alone, but not all together.",
            fix="a larger share for one of them.",
            code=Exit.OUT_OF_BUDGET,
        )
    return tuple(int(found.x[start : start + size].argmax()) for start, size in zip(starts, sizes, strict=False))
