"""Multi-weight pruning: many weights leave at once, and the rest move to their joint optimum.

"Pruning Foundation Models for High Accuracy without Retraining" (Zhao et al., Findings of EMNLP 2024, arXiv 2410.15567).
Removing the set P from a row costs L*(P) = ½ w_P (K_PP)⁻¹ w_Pᵀ (Eq. 12) and moves it by δ = −w_P (K_PP)⁻¹ K_P,: (Eq. 11, 13),
with K = (G + λ·Id)⁻¹. The paper names its variants (mask)(compensation), S for single and M for multiple:

    SS  mask single, compensation sequential        SM  mask single, compensation block
    MS  mask joint,  compensation sequential        MM  mask joint,  compensation block

We differ in one decisive point: after any of these masks the kept weights are solved again *from the dense weights*, all
columns jointly (``compensation="exact"``), which by construction is never worse than any block-wise compensation of the same
mask. Block order, the scope of the quota and the damping are not settled by the paper; ours are our own reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from duramen.calibrate.walker import Records, Walk
from duramen.families.model import Model
from duramen.problem import Problem
from duramen.prune import magnitude, wanda
from duramen.prune.allocation import Allocation
from duramen.prune.compensate import Swept, compensate, sweep
from duramen.prune.factor import Factor, factorise
from duramen.prune.layer import Damping
from duramen.prune.model import PruneSettings, prune_model
from duramen.prune.pattern import Pattern, Sparse, keep_existing_zeros, lasting_zeros, parse_pattern, select
from duramen.prune.pruned import Pruned, finish
from duramen.prune.reconstruct import check_shapes, compute_dtype, reconstruct
from duramen.prune.sparsegpt import block_mask, sweep_mask
from duramen.prune.support import admm, rounds, swap
from duramen.registry import method

Mask = Literal["auto", "admm", "rounds", "single", "joint", "sparsegpt", "wanda", "magnitude"]
Refine = Literal["auto", "none", "swap"]
Compensation = Literal["exact", "block", "sequential", "none"]


@dataclass(frozen=True)
class Effort:
    """What one word for the effort stands for.

    Attributes:
        mask: Source of the mask; None for one sweep, ``joint`` for N:M and ``single`` otherwise.
        refine: What betters the mask.
        penalty: Where ADMM begins.
        iterations: Conjugate gradient iterations of the exact solve; None for as many as it takes.
        allocation: How one share is spread over the layers.
        dense_target: α; above 0 the dense model runs in step, which about doubles the forward passes.
    """

    mask: Mask | None
    refine: Refine
    penalty: float = 0.3
    iterations: int | None = None
    dense_target: float = 0.25
    allocation: Allocation = "uniform"


EFFORTS = {
    "fast": Effort(None, "none", iterations=3, dense_target=0.0),
    "good": Effort("admm", "none"),
    "best": Effort("admm", "swap", penalty=0.1, allocation="owl"),
}

MOST_SETS = 1000
"""Removed sets of a group that are compared one by one; 6 of 12 has 924."""


class Settings(PruneSettings):
    """Settings of multi-weight pruning."""

    effort: Literal["fast", "good", "best"] = "good"
    """`fast`: one sweep chooses, and three iterations solve; `good`: a mask searched for as a whole, solved exactly; `best`: then bettered by exchanges, and a share spread over the layers by their outliers."""
    mask: Mask = "auto"
    """How weights are chosen: `admm` or `rounds` (searched), `single` (Eq. 14), `joint` (whole N:M groups, Eq. 12), or another method's mask. `auto`: by `effort`."""
    refine: Refine = "auto"
    """`swap` exchanges kept for removed weights while the exact loss falls. `auto`: by `effort`."""
    compensation: Compensation = "exact"
    """How the kept weights move: `exact` joint solve from the dense weights, `block` (M), `sequential` (S), or `none`."""
    block: Annotated[int, Field(ge=1)] | Literal["all"] = 128
    """Columns that share one quota and are compensated together while a sweep chooses the mask."""
    damping: Damping = "held-out"
    """λ as a share of the mean diagonal of the Gram; `held-out` chooses it on held-out sequences."""
    dense_target: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"
    """0 fits the dense layer on the inputs that the edited model sees; 1 fits the output of the dense model. `auto`: by `effort`."""
    bias: Literal["auto", "off"] = "auto"
    """`auto` corrects the bias of layers that have one for the mean change of their outputs."""
    tolerance: float = Field(default=1e-4, gt=0)
    """Proven bound on the relative excess of the loss at which the exact solve stops."""
    max_iterations: int = Field(default=200, ge=0)
    """Conjugate gradient iterations before a row is solved directly."""

    @property
    def spread(self) -> Allocation:
        """The allocation that is used; patterns and gradients over the blocks leave none to choose."""
        if self.allocation != "auto":
            return self.allocation
        return EFFORTS[self.effort].allocation if isinstance(self.sparsity, float) else "uniform"

    @property
    def alpha(self) -> float:
        """α of the target."""
        return EFFORTS[self.effort].dense_target if self.dense_target == "auto" else self.dense_target

    @property
    def trial(self) -> dict[str, Any]:
        """Dampings are compared with one sweep each."""
        return {"effort": "fast"} if self.mask == "auto" else {}

    @property
    def products(self) -> int:
        """A sweep, three rough iterations of two products each, a check; 18 of ADMM and the exact solve; 33, exchanges and the solve."""
        return {"fast": 9, "good": 35, "best": 130}[self.effort]


def joint_update(
    weight_row: Float[Tensor, "I"], pruned_row: Bool[Tensor, "I"], inverse: Float[Tensor, "I I"]
) -> Float[Tensor, "I"]:
    """δ = −w_P (K_PP)⁻¹ K_P,: (Eq. 11), the readable reference. Row [I], mask bool [I], K [I, I] -> [I]."""
    among = inverse[pruned_row][:, pruned_row]
    forces: Tensor = torch.linalg.solve(among, weight_row[pruned_row])
    return -forces @ inverse[pruned_row]


def joint_loss(
    weight_row: Float[Tensor, "I"], pruned_row: Bool[Tensor, "I"], inverse: Float[Tensor, "I I"]
) -> Float[Tensor, ""]:
    """L* = ½ w_P (K_PP)⁻¹ w_Pᵀ (Eq. 12), the readable reference. Row [I], mask bool [I], K [I, I] -> scalar."""
    removed = weight_row[pruned_row]
    forces: Tensor = torch.linalg.solve(inverse[pruned_row][:, pruned_row], removed)
    return 0.5 * removed @ forces


def single_mask(weight: Float[Tensor, "O I"], factor: Factor, target: Pattern, block: int) -> Swept:
    """Chooses by the loss of each weight alone, w²/K_jj (Eq. 14), block by block, compensating each block jointly.

    Args:
        weight: [O, I], in the dtype of the factor. Zeros go first.
        factor: Damped Gram of the inputs.
        target: What to remove.
        block: Columns that share one quota; for N:M a multiple of the group.
    """
    zeros = weight == 0

    def choose(work: Tensor, start: int, stop: int) -> Tensor:
        scores = work[:, start:stop].square() / factor.trailing(start, stop).diagonal()
        return block_mask(scores.masked_fill(zeros[:, start:stop], -1), target, start)

    return sweep(weight, factor, choose, width=block, lazy=512)


def joint_mask(weight: Float[Tensor, "O I"], factor: Factor, target: Pattern) -> Swept:
    """Chooses each N:M group as a whole by its exact loss (Eq. 12), groups one after another, compensating each jointly."""

    def choose(work: Tensor, start: int, stop: int) -> Tensor:
        return group_mask(work[:, start:stop], factor.trailing(start, stop), target)

    return sweep(weight, factor, choose, width=target.group)


def group_mask(weight: Float[Tensor, "O f"], inverse_block: Float[Tensor, "f f"], target: Pattern) -> Bool[Tensor, "O f"]:
    """The removed set of one group with the least joint loss w_P (K_PP)⁻¹ w_Pᵀ, over all sets of the pattern's size.

    Args:
        weight: One group of columns, [O, M].
        inverse_block: K of the group with the columns to its left frozen, [M, M].
        target: N:M pattern. A last, incomplete group stays whole.

    Returns:
        bool [O, M].
    """
    outputs, size = weight.shape
    pruned = torch.zeros(outputs, size, dtype=torch.bool, device=weight.device)
    if size < target.group:
        return pruned
    sets = torch.tensor(list(combinations(range(size), target.group - target.kept)), device=weight.device)
    among = inverse_block[sets[:, :, None], sets[:, None, :]]
    removed = weight[:, sets]
    loss = torch.einsum("osp,spq,osq->os", removed, torch.linalg.inv(among), removed)
    return pruned.scatter_(1, sets[loss.argmin(1)], True)


def choose_mask(
    weight: Float[Tensor, "O I"],
    gram: Float[Tensor, "I I"],
    factor: Factor,
    target: Pattern,
    mask: Mask,
    *,
    block: int,
    penalty: float,
) -> Sparse:
    """Runs one mask source; those without a compensation of their own return the dense weights, masked."""
    if mask == "single":
        return single_mask(weight, factor, target, block)
    if mask == "joint":
        return joint_mask(weight, factor, target)
    if mask == "sparsegpt":
        return sweep_mask(weight, factor, target, block)
    if mask == "admm":
        return admm(weight, factor, target, penalty=penalty)
    if mask == "rounds":
        return rounds(weight, factor, target)
    scores = wanda.score(weight, gram.diagonal()) if mask == "wanda" else magnitude.score(weight)
    scope: Literal["row", "layer"] = "row" if mask == "wanda" else "layer"
    pruned = select(keep_existing_zeros(scores, weight, target), target, scope=scope)
    return Sparse(weight.masked_fill(pruned, 0), pruned)


def prune(
    weight: Tensor,
    gram: Tensor,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    effort: Literal["fast", "good", "best"] = "good",
    mask: Mask = "auto",
    refine: Refine = "auto",
    compensation: Compensation = "exact",
    block: int | Literal["all"] = 128,
    damping: float = 0.01,
    tolerance: float = 1e-4,
    max_iterations: int = 200,
    factor: Factor | None = None,
) -> Pruned:
    """Removes many weights at once and moves the rest to their joint optimum.

    Args:
        weight: [O, I].
        gram: XXᵀ over tokens at any positive scale, [I, I].
        sparsity: Share to remove, in [0, 1); or
        pattern: ``"kept:group"``, such as ``"2:4"``.
        effort: Chooses the next two, where they are ``"auto"``; see ``Settings``.
        mask: Which weights go; see ``Settings``.
        refine: Whether exchanges better the mask; see ``Settings``.
        compensation: How the others move; see ``Settings``.
        block: Columns that share one quota in a sweep, or ``"all"``.
        damping: λ as a share of the mean diagonal of the Gram.
        tolerance: Proven relative excess of the loss at which the exact solve stops.
        max_iterations: Conjugate gradient iterations before a row is solved directly.
        factor: The Gram with this damping, factorised, where the caller has it already.

    Raises:
        Problem: On shapes or settings that do not fit.
    """
    check_shapes(weight, gram)
    target, chosen = parse_pattern(sparsity, pattern), EFFORTS[effort]
    few = target.grouped and comb(target.group, target.kept) <= MOST_SETS
    if mask == "joint" and target.grouped and not few:
        raise Problem(
            f"`mask: joint` cannot look at {comb(target.group, target.kept):,} sets of every group of {target}.",
            why=f"all of them are compared, at most {MOST_SETS:,}.",
            fix="`mask: single`, or smaller groups.",
        )
    source = (chosen.mask or ("joint" if few else "single")) if mask == "auto" else mask
    width = _width(block, target, weight.shape[1], source)
    dtype = compute_dtype(weight)
    factor, dense = factor or factorise(gram, damping, dtype=dtype), weight.to(dtype)
    found = choose_mask(dense, gram, factor, target, source, block=width, penalty=chosen.penalty)
    if (chosen.refine if refine == "auto" else refine) == "swap":
        found = swap(dense, factor, found, target)
    if target.grouped:  # where a sparse weight has more zeros in a group than the pattern takes
        found = Sparse(found.weight, found.pruned | lasting_zeros(dense))
    if compensation == "exact":
        limit = chosen.iterations if mask == "auto" else None
        solved = reconstruct(
            weight, gram, found.pruned, damping=damping, tolerance=tolerance, factor=factor, complete=limit is None,
            max_iterations=limit or max_iterations, start=found.weight,
        )  # fmt: skip
        return finish(
            weight, solved.weight, found.pruned, gram,
            error=solved.error, damping=factor.damping, excess=solved.excess, iterations=solved.iterations,
        )  # fmt: skip
    widths = {"block": width, "sequential": 1}
    edited = (
        dense.masked_fill(found.pruned, 0)
        if compensation == "none"
        else compensate(dense, found.pruned, factor, widths[compensation])[0]
    )
    return finish(weight, edited, found.pruned, gram, damping=factor.damping)


def _width(block: int | Literal["all"], target: Pattern, inputs: int, mask: Mask) -> int:
    if mask == "joint" and not target.grouped:
        raise Problem(
            "`mask: joint` needs an N:M pattern.",
            why="it compares all removed sets of a group, and an unstructured share has no groups.",
            fix='`mask: single`, or a pattern such as "2:4".',
        )
    width = inputs if block == "all" else min(block, inputs)
    if target.grouped and width < inputs:
        width = max(target.group, width - width % target.group)
    return width


@method("multiweight", title="Multi-weight pruning", paper="arXiv 2410.15567", kind="prune", settings=Settings)
def apply(model: Model, tokens: Tensor, *, walk: Walk | None = None, **settings: object) -> Records:
    """Prunes every linear weight of the model's blocks; see ``prune_model``."""
    return prune_model(prune, model, tokens, Settings.model_validate(settings), walk=walk)
