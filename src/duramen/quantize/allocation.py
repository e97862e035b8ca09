"""Which layer gets how many bits under a budget: those widths for which the layers' errors add up to the least, by integer programming.

The damage of a layer at a width is the relative error of its outputs when it is rounded to nearest with steps as they will be chosen, on the inputs that the dense model feeds it. That damages add up is a
heuristic: layers after one another amplify or hide what came before.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp

from duramen.calibrate.statistics import Statistics
from duramen.families.model import Layer
from duramen.grids import Grid, encode
from duramen.problem import Problem
from duramen.prune.reconstruct import output_error
from duramen.quantize.steps import Step, choose_steps, rounded_to

ROWS = 128
"""Rows of a layer that stand for all."""


def survey(
    layer: Layer, statistics: Statistics, grid: Grid, widths: tuple[int, ...], step: Step, step_type: torch.dtype
) -> dict[str, Any]:
    """What one layer of the dense model would lose, and take, at every width.

    Returns:
        ``name``, ``size``, and by width the relative ``errors`` and the bits of the layer, steps included.
    """
    weight, gram = layer.read().float(), statistics.total.second
    rows = weight[:: max(1, len(weight) // ROWS)][:ROWS]
    whole = max(output_error(rows, torch.zeros_like(rows), gram), 1e-30)
    errors, bits = [], []
    for width in widths:
        narrow = replace(grid, bits=width)
        steps, zeros = choose_steps(rows, narrow, step, gram.diagonal())
        steps = rounded_to(steps, step_type)
        rounded = (encode(rows, steps, zeros, narrow).view(*steps.shape, -1) * steps[:, :, None]).view_as(rows)
        errors.append(output_error(rows, rounded, gram) / whole)
        bits.append(bits_of(narrow, len(weight), weight.shape[1], step_type))
    return {"name": layer.name, "size": weight.numel(), "errors": errors, "bits": bits}


def bits_of(grid: Grid, outputs: int, inputs: int, step_type: torch.dtype) -> int:
    """Bits of a matrix on a grid, with its steps and codes of zero."""
    return outputs * inputs * grid.bits + outputs * (inputs // grid.width(inputs)) * (
        8 * step_type.itemsize + grid.bits * grid.affine
    )


def choose_widths(surveys: list[dict[str, Any]], widths: tuple[int, ...], mean_bits: float) -> dict[str, int]:
    """The width of every layer: the least sum of errors among all choices that take no more than so many bits per weight.

    Args:
        surveys: Of ``survey``.
        widths: What may be chosen.
        mean_bits: Bits per weight over all layers, steps included.

    Raises:
        Problem: If even the least widths take more.
    """
    budget = mean_bits * sum(item["size"] for item in surveys)
    least = sum(min(item["bits"]) for item in surveys)
    if least > budget:
        raise Problem(
            f"{mean_bits} bits per weight are too few.",
            why=f"the least width, {min(widths)}, takes {least / sum(item['size'] for item in surveys):.3f} with its steps.",
            fix="more bits, wider groups, or smaller `widths`.",
        )
    errors, bits = (np.array([item[key] for item in surveys], dtype=float) for key in ("errors", "bits"))
    layers, choices = errors.shape
    one_each = np.kron(np.eye(layers), np.ones(choices))
    scale = bits.max()
    solved = milp(
        errors.ravel() / max(errors.max(), 1e-300),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(bits.ravel()[None] / scale, -np.inf, budget / scale)],
        integrality=np.ones(layers * choices), bounds=Bounds(0, 1), options={"mip_rel_gap": 0.0},
    )  # fmt: skip
    chosen = solved.x.reshape(layers, choices).argmax(1)
    return {item["name"]: widths[place] for item, place in zip(surveys, chosen, strict=True)}
