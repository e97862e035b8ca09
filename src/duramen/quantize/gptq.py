"""GPTQ: column by column every weight is rounded, and the columns still free make up for it; then codes and steps are refined on the same quadratic.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323. With all columns
to its right free, rounding w_j to ŵ_j costs E_j² = (w_j − ŵ_j)²/U_jj², and the E_j² of a row add up to its loss (ŵ−w)H(ŵ−w)ᵀ. Steps of groups are chosen from the
weights before the first column is rounded. Ours is what follows: codes descend one by one, and steps are solved for the codes that they have; neither ever raises that loss.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from duramen.calibrate.walker import Records, Walk
from duramen.families.model import Model
from duramen.grids import Grid, pack
from duramen.prune.factor import Factor, factorise
from duramen.prune.layer import Damping
from duramen.prune.pattern import lasting_zeros
from duramen.prune.pruned import Pruned
from duramen.prune.reconstruct import check_shapes, compute_dtype
from duramen.quantize.model import QuantizeSettings, finish, quantize_model
from duramen.quantize.steps import Step, choose_steps, of_every_weight, rounded_to
from duramen.registry import method

Order = Literal["act", "natural"]
LAZY = 128
"""Columns after which what is pending reaches the rest of the matrix."""
ENOUGH = 1e-3
"""Refining ends when a round lowers the loss by less than this share."""


class Settings(QuantizeSettings):
    """Settings of GPTQ."""

    order: Order = "act"
    """Which columns are rounded first: those with the largest inputs (`act`), or from left to right (`natural`)."""
    refine: Annotated[int, Field(ge=0)] = 4
    """Rounds, at most, in which codes descend and steps are solved for them; 0 is GPTQ as published."""
    damping: Damping = 0.01
    """λ as a share of the mean diagonal of the Gram; `held-out` chooses it on held-out sequences."""
    dense_target: Annotated[float, Field(ge=0, le=1)] = 0.0
    """0 fits each layer to the dense layer on the inputs it now sees, 1 to the output of the dense model, which makes up for earlier layers."""

    @property
    def alpha(self) -> float:
        """Share of the dense model's output in the target."""
        return self.dense_target

    @property
    def products(self) -> int:
        """A sweep for the codes and for every round, and a product for the steps."""
        return 4 + 5 * self.refine


def round_columns(
    weight: Float[Tensor, "O I"],
    upper: Float[Tensor, "I I"],
    step: Float[Tensor, "O I"],
    zero: Float[Tensor, "O I"],
    grid: Grid,
    pruned: Bool[Tensor, "O I"],
) -> Float[Tensor, "O I"]:
    """The codes, counted from zero, of one pass from left to right.

    Args:
        weight: What to round.
        upper: U of the damped Gram in this order of columns.
        step: α of every weight.
        zero: The code of zero of every weight.
        grid: The grid.
        pruned: Weights that are to be zero.
    """
    work, codes = weight.clone(), torch.empty_like(weight)
    for first in range(0, weight.shape[1], LAZY):
        last = min(first + LAZY, weight.shape[1])
        errors = torch.zeros(len(weight), last - first, dtype=weight.dtype, device=weight.device)
        for column in range(first, last):
            code = _nearest(work[:, column] / step[:, column], zero[:, column], grid).masked_fill(pruned[:, column], 0)
            error = (work[:, column] - code * step[:, column]) / upper[column, column]
            work[:, column:last].addr_(error, upper[column, column:last], alpha=-1)
            codes[:, column], errors[:, column - first] = code, error
        work[:, last:].addmm_(errors, upper[first:last, last:], alpha=-1)
    return codes


def descend(
    codes: Float[Tensor, "O I"],
    weight: Float[Tensor, "O I"],
    hessian: Float[Tensor, "I I"],
    step: Float[Tensor, "O I"],
    zero: Float[Tensor, "O I"],
    grid: Grid,
    pruned: Bool[Tensor, "O I"],
) -> Float[Tensor, "O I"]:
    """One sweep of coordinate descent: every code moves to where the loss is least with all others as they are; the arguments are as in ``round_columns``."""
    codes = codes.clone()
    slope = (codes * step - weight) @ hessian
    for first in range(0, weight.shape[1], LAZY):
        last = min(first + LAZY, weight.shape[1])
        moved = torch.zeros(len(weight), last - first, dtype=weight.dtype, device=weight.device)
        here = slope[:, first:last]
        for column in range(first, last):
            alpha, curvature, falls = step[:, column], hessian[column, column], here[:, column - first]
            wanted = codes[:, column] - falls / (curvature * alpha)
            code = _nearest(wanted, zero[:, column], grid).masked_fill(pruned[:, column], 0)
            delta = (code - codes[:, column]) * alpha
            delta = delta.masked_fill(delta * (2 * falls + delta * curvature) >= 0, 0)
            codes[:, column] = torch.where(delta != 0, code, codes[:, column])
            here.addr_(delta, hessian[column, first:last])
            moved[:, column - first] = delta
        slope[:, :first].addmm_(moved, hessian[first:last, :first])
        slope[:, last:].addmm_(moved, hessian[first:last, last:])
    return codes


def refit(
    codes: Float[Tensor, "O I"], weight: Float[Tensor, "O I"], hessian: Float[Tensor, "I I"], steps: Float[Tensor, "O n"]
) -> Float[Tensor, "O n"]:
    """The steps of every row and group with the least loss for codes, counted from zero, that stay; as they were where that is no positive number.

    Args:
        codes: As ``round_columns`` gives them, in the order of the groups.
        weight: What they are to come near to.
        hessian: H.
        steps: The present ones.
    """
    outputs, groups = steps.shape
    parts = codes.view(outputs, groups, -1)
    width = parts.shape[2]
    wanted = ((weight @ hessian).view_as(parts) * parts).sum(-1)
    system = torch.empty(outputs, groups, groups, dtype=weight.dtype, device=weight.device)
    for group in range(groups):
        reached = parts[:, group] @ hessian[group * width : (group + 1) * width]
        system[:, group] = (reached.view_as(parts) * parts).sum(-1)
    empty = (parts == 0).all(-1)
    system.diagonal(dim1=1, dim2=2).add_(empty.to(weight.dtype))
    solved, failed = torch.linalg.solve_ex(system, wanted)
    good = ((solved > 0) | empty).all(1, keepdim=True) & (failed == 0)[:, None]
    return torch.where(good & ~empty, solved, steps)


def quantize(
    weight: Tensor,
    gram: Tensor,
    *,
    grid: Grid,
    step: Step = "weighted",
    step_type: torch.dtype = torch.float32,
    order: Order = "act",
    refine: int = 4,
    damping: float = 0.01,
    factor: Factor | None = None,
    pruned: Bool[Tensor, "O I"] | None = None,
) -> Pruned:
    """Rounds by GPTQ, and refines.

    Args:
        weight: [O, I].
        gram: XXᵀ over tokens, [I, I].
        grid: What to round to.
        step: How steps are chosen before the first column is rounded.
        step_type: Type that steps are rounded to.
        order: Of the columns.
        refine: Rounds of refinement at most.
        damping: λ as a share of the mean diagonal of the Gram.
        factor: The Gram with this damping, factorised in its natural order, where the caller has it already.
        pruned: What must stay zero, [O, I]; None for all zeros of a sparse weight.

    Raises:
        Problem: On shapes or settings that do not fit.
    """
    check_shapes(weight, gram)
    factor = factor or factorise(gram, damping, dtype=compute_dtype(weight))
    hessian = factor.hessian
    work, pruned = weight.to(hessian.dtype), lasting_zeros(weight) if pruned is None else pruned
    steps, zeros = choose_steps(work, grid, step, hessian.diagonal())
    steps = rounded_to(steps, step_type)
    alpha, zero = of_every_weight(steps, zeros, work.shape[1])
    upper, columns = factor.upper, torch.arange(work.shape[1], device=work.device)
    if order == "act":
        columns = hessian.diagonal().argsort(descending=True, stable=True)
        upper = factorise(gram[columns][:, columns], factor.damping, dtype=hessian.dtype).upper
    codes = torch.empty_like(work)
    codes[:, columns] = round_columns(work[:, columns], upper, alpha[:, columns], zero[:, columns], grid, pruned[:, columns])
    before = _loss(codes * alpha - work, hessian)
    for _ in range(refine):
        codes = descend(codes, work, hessian, alpha, zero, grid, pruned)
        if grid.share != "tensor":
            steps = rounded_to(refit(codes, work, hessian, steps), step_type)
            alpha, _ = of_every_weight(steps, zeros, work.shape[1])
        now = _loss(codes * alpha - work, hessian)
        if now > (1 - ENOUGH) * before:
            break
        before = now
    return finish(weight, pack(codes, steps.to(step_type), zeros, grid), gram, pruned, damping=factor.damping)


def _nearest(codes: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """The nearest codes that there are, counted from zero."""
    return codes.round().clamp(grid.least - zero, grid.most - zero)


def _loss(delta: Tensor, hessian: Tensor) -> float:
    return float(((delta @ hessian) * delta).sum())


@method("gptq", title="GPTQ, refined", paper="arXiv 2210.17323", kind="quantize", settings=Settings)
def apply(model: Model, tokens: Tensor, *, walk: Walk | None = None, **settings: object) -> Records:
    """Rounds every linear weight of the model's blocks; see ``quantize_model``."""
    return quantize_model(quantize, model, tokens, Settings.model_validate(settings), walk=walk)
