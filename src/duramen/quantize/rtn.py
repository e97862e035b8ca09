"""Round to nearest: every weight goes to the nearest point of its grid, whatever the others do; the baseline."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from duramen.calibrate.walker import Records, Walk
from duramen.families.model import Model
from duramen.grids import Grid, encode, pack
from duramen.prune.pattern import lasting_zeros
from duramen.prune.pruned import Pruned
from duramen.prune.reconstruct import check_shapes, compute_dtype
from duramen.quantize.model import QuantizeSettings, finish, quantize_model
from duramen.quantize.steps import Step, choose_steps, rounded_to
from duramen.registry import method


def quantize(
    weight: Tensor,
    gram: Tensor,
    *,
    grid: Grid,
    step: Step = "weighted",
    step_type: torch.dtype = torch.float32,
    pruned: Bool[Tensor, "O I"] | None = None,
) -> Pruned:
    """Rounds to nearest.

    Args:
        weight: [O, I].
        gram: XXᵀ over tokens, [I, I]; its diagonal weighs the errors by which ``weighted`` steps are chosen.
        grid: What to round to.
        step: How steps are chosen.
        step_type: Type that steps are rounded to.
        pruned: What must stay zero, [O, I]; None for all zeros of a sparse weight.

    Raises:
        Problem: On shapes or settings that do not fit.
    """
    check_shapes(weight, gram)
    work = weight.to(compute_dtype(weight))
    steps, zeros = choose_steps(work, grid, step, gram.diagonal())
    steps = rounded_to(steps, step_type)
    pruned = lasting_zeros(weight) if pruned is None else pruned
    return finish(weight, pack(encode(work, steps, zeros, grid), steps.to(step_type), zeros, grid), gram, pruned)


@method("rtn", title="Round to nearest", paper="the baseline of all", kind="quantize", settings=QuantizeSettings)
def apply(model: Model, tokens: Tensor, *, walk: Walk | None = None, **settings: object) -> Records:
    """Rounds every linear weight of the model's blocks; see ``quantize_model``."""
    return quantize_model(quantize, model, tokens, QuantizeSettings.model_validate(settings), walk=walk)
