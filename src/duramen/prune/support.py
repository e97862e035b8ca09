"""Better masks: supports that are searched for as a whole, where a single pass takes the next best weight and never looks back.

``admm`` lets a dense and a sparse copy of the weights come together (ALPS, Meng et al., arXiv 2406.07831; we refactor where they
keep an eigendecomposition). ``rounds`` removes a little at a time and solves exactly in between. ``swap`` betters any mask by
exchanging kept for removed weights. Our derivation of the last two: with ŵ exact on the kept set S and g = (ŵ−w)H, weight j costs
ŵ_j²/[(H_SS)⁻¹]_jj when it goes and weight p gains g_p²/σ_p when it returns, σ_p being its variance that S does not explain. Both
curvatures differ from row to row; we take their geometric mean over some rows, and let the exact loss, which is solved anew after
every exchange, decide. So everything is matrix products, at any width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from duramen.hardware.machine import rough_product
from duramen.prune.factor import Factor
from duramen.prune.pattern import Pattern, Sparse, existing_zeros, select
from duramen.prune.reconstruct import solve_iteratively

PENALTY_LIMITS = 1e-4, 1e6
"""Below the first a support that has not moved never will; above the second ALPS stops to raise the penalty."""
SETTLED = 2e-3
"""Share of the support that still changes when ADMM may stop, from its 12th iteration on (ALPS: 3e-4, from the 30th)."""
SAMPLED_ROWS = 16
"""Rows whose curvatures stand for all."""
ROUGH = 1e-3
"""Relative excess up to which the exact loss is solved while the mask is still sought."""


def admm(
    weight: Float[Tensor, "O I"], factor: Factor, target: Pattern, *, penalty: float = 0.3, max_iterations: int = 300
) -> Sparse:
    """Finds a mask by the alternating direction method of multipliers (ALPS, Algorithm 1).

    In columns scaled to unit curvature, A = W·diag(H)^½ and G̃ = diag(H)^−½ H diag(H)^−½: the dense copy
    B = (AG̃ − V + ρD)(G̃ + ρ·Id)⁻¹ and the sparse copy D = Proj(B + V/ρ) are drawn together by V += ρ(B − D), with ρ raised as the
    support comes to rest.

    Args:
        weight: [O, I], in the dtype of the factor. Zeros go first.
        factor: Damped Gram of the inputs.
        target: What to remove; a share is ranked over the whole matrix.
        penalty: First ρ; ALPS begins at 0.1, which takes about twice as long for slightly better masks.
        max_iterations: Upper limit.

    Returns:
        The mask with the sparse copy, which is near to the exact solution.
    """
    scale = factor.hessian.diagonal().sqrt()
    matrix = factor.hessian / scale[:, None] / scale
    dense = weight * scale
    wanted = dense @ matrix

    zeros = existing_zeros(weight, target)

    def chosen(scaled: Tensor) -> Tensor:
        return select(scaled.square().masked_fill_(zeros, -1), target)

    rho, raised = penalty, False
    solver = _shifted_inverse(matrix, rho)
    pruned = settled = chosen(dense)
    sparse, dual = dense.masked_fill(pruned, 0), torch.zeros_like(dense)
    for iteration in range(1, max_iterations + 1):
        free = rough_product((wanted - dual).add_(sparse, alpha=rho), solver)
        both = free.add(dual, alpha=1 / rho)
        pruned = chosen(both)
        sparse = both.masked_fill(pruned, 0)
        dual.add_(free - sparse, alpha=rho)
        if iteration % 3:
            continue
        changed, settled = int((pruned != settled).sum()) / max(int((~pruned).sum()), 1), pruned
        if (raised and (changed == 0 or (iteration > 12 and changed < SETTLED))) or rho < PENALTY_LIMITS[0]:
            break
        if changed > 0.005 or (raised and changed > 0):
            raised, rho = True, min(rho * (1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1), PENALTY_LIMITS[1])
        else:
            rho, pruned = rho / 5, chosen(dense)
            sparse, dual = dense.masked_fill(pruned, 0), torch.zeros_like(dense)
        solver = _shifted_inverse(matrix, rho)
    return Sparse(sparse.div_(scale), pruned)


def _shifted_inverse(matrix: Float[Tensor, "I I"], shift: float) -> Float[Tensor, "I I"]:
    """(matrix + shift·Id)⁻¹; with a unit diagonal and ρ far above rounding, float32 is enough."""
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted))


@dataclass(frozen=True)
class Curvature:
    """Typical [(H_SS)⁻¹]_jj of a kept and unexplained variance σ_p of a removed input, both [I]."""

    kept: Float[Tensor, "I"]
    removed: Float[Tensor, "I"]


def curvature(factor: Factor, pruned: Bool[Tensor, "O I"], *, rows: int = SAMPLED_ROWS) -> Curvature:
    """Geometric means over some rows, evenly spread; where no sampled row keeps (removes) an input, its value with all inputs kept.

    Args:
        factor: Damped Gram of the inputs.
        pruned: bool [O, I].
        rows: Rows to look at.
    """
    matrix = factor.hessian
    inputs = len(matrix)
    total = torch.zeros(2, inputs, dtype=matrix.dtype, device=matrix.device)
    count = torch.zeros_like(total)
    for mask in pruned[torch.linspace(0, len(pruned) - 1, min(rows, len(pruned)), device=pruned.device).round().long()]:
        kept, removed = (~mask).nonzero()[:, 0], mask.nonzero()[:, 0]
        lower = torch.linalg.cholesky(matrix[kept][:, kept])
        identity = torch.eye(len(kept), dtype=matrix.dtype, device=matrix.device)
        inverse_root = torch.linalg.solve_triangular(lower, identity, upper=False)
        explained = (inverse_root @ matrix[kept][:, removed]).square().sum(0)
        unexplained = (matrix.diagonal()[removed] - explained).clamp_min(torch.finfo(matrix.dtype).tiny)
        total[0, kept] += inverse_root.square().sum(0).log()
        total[1, removed] += unexplained.log()
        count[0, kept] += 1
        count[1, removed] += 1
    alone = factor.upper.square().sum(0)
    mean = torch.where(count > 0, (total / count.clamp_min(1)).exp(), torch.stack([alone, 1 / alone]))
    return Curvature(mean[0], mean[1])


def rounds(weight: Float[Tensor, "O I"], factor: Factor, target: Pattern, *, steps: int = 8) -> Sparse:
    """Removes the share in equal steps, each by the losses ŵ_j²/[(H_SS)⁻¹]_jj at the exact solution so far.

    With as many steps as weights this is greedy OBS. For N:M the groups lose one weight after another.

    Args:
        weight: [O, I], in the dtype of the factor. Zeros go first.
        factor: Damped Gram of the inputs.
        target: What to remove; a share is ranked over the whole matrix.
        steps: Number of rounds for a share.
    """
    stages, zeros = _stages(target, weight.numel(), steps), existing_zeros(weight, target)
    pruned = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    work = weight
    for number, stage in enumerate(stages):
        if number:
            work = solve_iteratively(weight, factor, pruned, start=work, tolerance=ROUGH).solution
        losses = work.square() / curvature(factor, pruned).kept
        pruned = select(losses.masked_fill(zeros, -1).masked_fill(pruned, -2), stage)
    return Sparse(work.masked_fill(pruned, 0), pruned)


def _stages(target: Pattern, size: int, steps: int) -> list[Pattern]:
    if target.grouped:
        return [Pattern(kept=kept, group=target.group) for kept in range(target.group - 1, target.kept - 1, -1)]
    counts = [round(target.quota(size) * step / steps) for step in range(1, steps + 1)]
    return [Pattern(sparsity=count / size) for count in counts]


def swap(
    weight: Float[Tensor, "O I"],
    factor: Factor,
    found: Sparse,
    target: Pattern,
    *,
    sweeps: int = 20,
    share: float = 0.25,
) -> Sparse:
    """Exchanges kept for removed weights, within rows or within N:M groups, as long as the exact loss falls.

    In every sweep each row makes a share of the exchanges that promise a gain, the best ones first, and is solved again. A row
    whose loss does not fall goes back and tries half as many. So no row ever ends above the loss it began with.

    Args:
        weight: Dense, [O, I], in the dtype of the factor.
        factor: Damped Gram of the inputs.
        found: The mask to better, and weights on it to start from.
        target: Its pattern.
        sweeps: Upper limit; ends when a sweep gains less than 1e-4 of the loss.
        share: Share of a row's promising exchanges that it makes at first.

    Returns:
        A mask with as many removed in every row (in every group) as before, and weights within 1e-3 of its least loss.
    """
    pruned = found.pruned.clone()
    now = solve_iteratively(weight, factor, pruned, start=found.weight, tolerance=ROUGH)
    work, loss = now.solution.clone(), now.loss.clone()
    portion = torch.full((len(weight),), share, dtype=weight.dtype, device=weight.device)
    typical = curvature(factor, pruned)
    for _ in range(sweeps):
        before = float(loss.sum())
        changed, count = _exchange(work, (work - weight) @ factor.hessian, pruned, typical, portion, target)
        rows = count.nonzero()[:, 0]
        if not len(rows):
            break
        trial = solve_iteratively(weight[rows], factor, changed[rows], start=work[rows], tolerance=ROUGH)
        better = trial.loss < loss[rows]
        taken, refused = rows[better], rows[~better]
        pruned[taken], work[taken], loss[taken] = changed[taken], trial.solution[better], trial.loss[better]
        portion[refused] = torch.where(count[refused] > 1, portion[refused] / 2, 0)
        if before - float(loss.sum()) < 1e-4 * before and len(refused) < len(taken):
            break
    return Sparse(work, pruned)


def _exchange(
    work: Float[Tensor, "O I"],
    gradient: Float[Tensor, "O I"],
    pruned: Bool[Tensor, "O I"],
    typical: Curvature,
    portion: Float[Tensor, "O"],
    target: Pattern,
) -> tuple[Bool[Tensor, "O I"], Tensor]:
    """The mask after each row's best exchanges, bool [O, I], and how many each row makes, [O]."""
    inputs = work.shape[1]
    gain = (gradient.square() / typical.removed).masked_fill(~pruned, -1)
    cost = (work.square() / typical.kept).masked_fill(pruned, torch.inf)
    if target.grouped:
        whole = inputs - inputs % target.group
        offset = torch.arange(0, whole, target.group, device=work.device)
        groups = (len(work), -1, target.group)
        gains, back = gain[:, :whole].reshape(groups).max(2)
        costs, out = cost[:, :whole].reshape(groups).min(2)
        order = (gains - costs).argsort(1, descending=True)
        gains, costs, back, out = (item.gather(1, order) for item in (gains, costs, back + offset, out + offset))
    else:
        most = max(1, inputs // 8)
        (gains, back), (costs, out) = gain.topk(most, 1), cost.topk(most, 1, largest=False)
    promising = (gains > costs).sum(1)
    count = (portion * promising).ceil().long()
    made = torch.arange(gains.shape[1], device=work.device) < count[:, None]
    changed = pruned.scatter(1, back, pruned.gather(1, back) & ~made)
    return changed.scatter(1, out, changed.gather(1, out) | made), count
