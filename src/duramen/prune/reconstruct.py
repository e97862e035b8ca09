"""Exact reconstruction: the kept weights that give the nearest output, for any mask.

Row by row: min over δ of ½ δHδᵀ subject to (w + δ) = 0 on the removed set P ("multiple removal problem", arXiv 2410.15567,
Eq. 11 and 13). Dual form: δ = −w_P (K_PP)⁻¹ K_P,: . Primal form, the same solution: ŵ_S = w_S + w_P H_PS (H_SS)⁻¹.

All rows are solved together by conjugate gradients projected on the kept set and preconditioned by K = H⁻¹. Our derivation:
the eigenvalues of K_SS H_SS are at least 1 and cluster there, and since K_SS ⪰ (H_SS)⁻¹ half of ρ = rᵀKr bounds the
excess loss. The iteration stops on that proven bound (the *certificate*), not on a guess. Small layers, and rows that are
not certified in time, go to a direct solve.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from duramen.finite import all_finite
from duramen.hardware.machine import rough_product
from duramen.problem import Problem
from duramen.prune.factor import Factor, factorise

DIRECT_UP_TO = 5e8
"""Work (rows × side³) up to which a layer is solved directly, in float64."""
CHUNK_ELEMENTS = 2**26
"""Elements of the batched matrices of one direct chunk (512 MiB in float64)."""


@dataclass(frozen=True)
class Reconstructed:
    """Weights on their mask, and how near they come.

    Attributes:
        weight: [O, I], in the dtype of the given weight; exact zeros where pruned.
        error: tr(ΔW·gram·ΔWᵀ), without damping, at the scale of the given Gram.
        excess: Share of the damped loss that is at most left to gain on this mask, proven.
        iterations: Conjugate gradient iterations; 0 for a direct solve.
        damping: λ as a share of the mean diagonal.
    """

    weight: Float[Tensor, "O I"]
    error: float
    excess: float
    iterations: int
    damping: float


def reconstruct(
    weight: Tensor,
    gram: Tensor,
    pruned: Tensor,
    *,
    damping: float = 0.01,
    tolerance: float = 1e-4,
    max_iterations: int = 200,
    complete: bool = True,
    factor: Factor | None = None,
    start: Tensor | None = None,
) -> Reconstructed:
    """Moves the kept weights of any mask to their joint optimum.

    Args:
        weight: Dense weights, [O, I] (outputs, inputs).
        gram: XXᵀ over tokens at any positive scale, [I, I].
        pruned: bool [O, I], True where a weight must be zero.
        damping: λ as a share of the mean diagonal of the Gram; pulls towards the dense weights.
        tolerance: Largest relative excess of the damped loss over its optimum.
        max_iterations: Limit of the conjugate gradient iterations; 0 solves all rows directly.
        complete: Whether rows that are not certified by then are solved directly; if not, the products are rounded to bfloat16
            where that is faster, and ``excess`` tells, up to that rounding, how far the rows may be.
        factor: The factorised Gram, where the caller has it already.
        start: Weights to start the iteration from, [O, I]; None for the dense ones.

    Raises:
        Problem: If shapes do not fit.
    """
    check_shapes(weight, gram)
    if pruned.shape != weight.shape or pruned.dtype != torch.bool:
        raise Problem(
            f"`pruned` must be bool {tuple(weight.shape)}, got {pruned.dtype} {tuple(pruned.shape)}.",
            why="it marks, entry by entry, the weights that must be zero.",
            fix="`pruned = new_weight == 0`.",
        )
    dtype = compute_dtype(weight)
    factor = factor or factorise(gram, damping, dtype=dtype)
    dense = weight.to(dtype)
    kept = ~pruned
    side = int(torch.minimum(pruned.sum(1), kept.sum(1)).max())
    systems = 1 if same_for_all_rows(pruned) else len(dense)
    if systems == 1 or systems * side**3 <= DIRECT_UP_TO or max_iterations < 1:
        solution, excess, iterations = solve_direct(dense, factor.hessian, pruned), 0.0, 0
    else:
        found = solve_iteratively(
            dense, factor, pruned, start=start, tolerance=tolerance, max_iterations=max_iterations, rough=not complete
        )
        solution, iterations = found.solution, found.iterations
        late = (found.excess > tolerance) & complete
        if bool(late.any()):
            solution[late] = solve_direct(dense[late], factor.hessian, pruned[late])
        excess = float(found.excess.masked_fill(late, 0).max())
    result = solution.to(weight.dtype).masked_fill(pruned, 0)
    return Reconstructed(result, output_error(weight, result, gram), excess, iterations, factor.damping)


def output_error(weight: Float[Tensor, "O I"], edited: Float[Tensor, "O I"], gram: Float[Tensor, "I I"]) -> float:
    """tr(ΔW·gram·ΔWᵀ), the squared change of the outputs summed over tokens; ΔW = edited − weight, [O, I]."""
    dtype = compute_dtype(weight)
    delta = edited.to(dtype) - weight.to(dtype)
    return float(((delta @ gram.to(dtype)) * delta).sum(dtype=torch.float64))


def compute_dtype(weight: Tensor) -> torch.dtype:
    """float64 for float64 weights, float32 for all others."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def check_shapes(weight: Tensor, gram: Tensor) -> None:
    """Stops unless weight is [O, I], finite, and the Gram [I, I]."""
    if weight.ndim != 2 or tuple(gram.shape) != (weight.shape[1], weight.shape[1]):
        raise Problem(
            f"weight {tuple(weight.shape)} and gram {tuple(gram.shape)} do not fit: [O, I] and [I, I] are needed.",
            why="weights are [outputs, inputs]; GPT-2's Conv1D stores them transposed.",
            fix="pass `weight.T` for a transposed layer.",
        )
    if not all_finite(weight):
        raise Problem(
            "The weight holds NaN or infinite values.",
            why="the checkpoint is damaged or training diverged.",
            fix="check the model with `duramen inspect`.",
        )


def same_for_all_rows(pruned: Bool[Tensor, "O I"]) -> bool:
    """Whether a mask consists of whole columns."""
    return bool((pruned == pruned[:1]).all())


def solve_direct(
    dense: Float[Tensor, "O I"], hessian: Float[Tensor, "I I"], pruned: Bool[Tensor, "O I"]
) -> Float[Tensor, "O I"]:
    """Solves every row by one Cholesky factorisation of its own, or all by one where they share a mask, in float64.

    A row takes the primal form if it keeps at most as many entries as it loses, else the dual form: the smaller system.

    Args:
        dense: [O, I].
        hessian: Damped Gram, [I, I].
        pruned: bool [O, I].

    Returns:
        [O, I] in the dtype of ``dense``.
    """
    target, matrix = dense.to(torch.float64), hessian.to(torch.float64)
    solution = target.masked_fill(pruned, 0)
    if same_for_all_rows(pruned):
        kept, lost = ~pruned[0], pruned[0]
        lower = torch.linalg.cholesky(matrix[kept][:, kept])
        solution[:, kept] += torch.cholesky_solve(matrix[kept][:, lost] @ target[:, lost].T, lower).T
        return solution.to(dense.dtype)
    primal = (~pruned).sum(1) <= pruned.sum(1)
    if bool(primal.any()):
        lost = target[primal].masked_fill(~pruned[primal], 0)
        solution[primal] += _solve_masked(matrix, lost @ matrix, ~pruned[primal])
    if not bool(primal.all()):
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
        forces = _solve_masked(inverse, target[~primal], pruned[~primal])
        solution[~primal] = (target[~primal] - forces @ inverse).masked_fill(pruned[~primal], 0)
    return solution.to(dense.dtype)


def _solve_masked(matrix: Float[Tensor, "I I"], rhs: Float[Tensor, "O I"], mask: Bool[Tensor, "O I"]) -> Float[Tensor, "O I"]:
    """X (matrix_MM) = rhs_M for the masked entries M of every row, zero elsewhere; [R, I].

    Rows are sorted by the size of M, so that a chunk of them pads to its own largest, with the identity.
    """
    solved = torch.zeros_like(rhs)
    counts = mask.sum(1)
    order = counts.argsort(descending=True)
    start = 0
    while start < len(order):
        side = int(counts[order[start]])
        if side == 0:
            break
        rows = order[start : start + max(1, CHUNK_ELEMENTS // side**2)]
        index = mask[rows].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :side]
        valid = mask[rows].gather(1, index)
        systems = matrix[index[:, :, None], index[:, None, :]].masked_fill(~(valid[:, :, None] & valid[:, None, :]), 0)
        systems.diagonal(dim1=1, dim2=2).add_((~valid).to(systems.dtype))
        target = rhs[rows].gather(1, index).masked_fill(~valid, 0)
        found = torch.cholesky_solve(target[:, :, None], torch.linalg.cholesky(systems))[:, :, 0]
        solved[rows] = torch.zeros_like(rhs[rows]).scatter_(1, index, found.masked_fill(~valid, 0))
        start += len(rows)
    return solved


@dataclass(frozen=True)
class Iterated:
    """What an iteration found: solution [O, I], loss F [O], the share of it at most left to gain [O], iterations."""

    solution: Float[Tensor, "O I"]
    loss: Float[Tensor, "O"]
    excess: Float[Tensor, "O"]
    iterations: int


def solve_iteratively(
    dense: Float[Tensor, "O I"],
    factor: Factor,
    pruned: Bool[Tensor, "O I"],
    *,
    start: Float[Tensor, "O I"] | None = None,
    tolerance: float,
    max_iterations: int = 200,
    rough: bool = False,
) -> Iterated:
    """Solves all rows together by conjugate gradients.

    Args:
        dense: The weights to come near to, [O, I], in the dtype of the factor.
        factor: Damped Gram of the inputs.
        pruned: bool [O, I].
        start: Weights to start from, [O, I]; None for the dense ones, masked.
        tolerance: Relative excess of the loss to certify.
        max_iterations: Upper limit.
        rough: Whether the products of the iteration may be rounded, good for the first few; rows that it did not better stay
            where they started.
    """
    support = (~pruned).to(dense.dtype)
    first = (dense if start is None else start) * support
    change = first - dense
    gradient = change @ factor.hessian
    loss = 0.5 * (change * gradient).sum(1)
    found = conjugate_gradients(
        gradient.mul_(support).neg_(), factor.hessian, factor.inverse, support,
        loss=loss, tolerance=tolerance, max_iterations=max_iterations, rough=rough,
    )  # fmt: skip
    solution = first + found.solution
    if rough:
        change = solution - dense
        worse = ~(0.5 * (change @ factor.hessian).mul_(change).sum(1) < loss)
        solution[worse] = first[worse]
    return replace(found, solution=solution)


def conjugate_gradients(
    residual: Float[Tensor, "O I"],
    matrix: Float[Tensor, "I I"],
    inverse: Float[Tensor, "I I"],
    support: Float[Tensor, "O I"],
    *,
    loss: Float[Tensor, "O"],
    tolerance: float,
    max_iterations: int,
    rough: bool = False,
) -> Iterated:
    """Solves (X·matrix)∘support = residual for X on the support, all rows at once.

    Preconditioned by ``inverse`` projected on the support. With F the loss and ρ = rᵀKr, ½ρ bounds F − F*, so a row is
    certified when ½ρ ≤ tolerance·(F − ½ρ). A step a lowers F by ½aρ, which leaves ½(1 − a)ρ as the bound after the last one.
    No step is longer than 1, since no eigenvalue is below 1; where rounding makes it so, or a curvature negative, it is not believed.
    Rows that are done are frozen by a zero step.

    Args:
        residual: [O, I], zero off the support.
        matrix: Symmetric positive definite, [I, I].
        inverse: Its inverse, [I, I].
        support: 1 where X may differ from zero, else 0, [O, I].
        loss: F at X = 0, per row, [O].
        tolerance: Relative excess to certify.
        max_iterations: Upper limit, at least 1.
        rough: Whether products may be rounded; see ``rough_product``.
    """
    product = rough_product if rough else torch.matmul
    tiny = torch.finfo(residual.dtype).tiny
    floor = torch.finfo(residual.dtype).eps ** 2 * loss
    change = torch.zeros_like(residual)
    excess, final = torch.zeros_like(loss), loss.clone()
    rows = torch.arange(len(residual), device=residual.device)
    state = _State(torch.zeros_like(residual), residual.clone(), residual, support, loss.clone(), torch.zeros_like(loss))
    for iterations in range(max_iterations):
        preconditioned = product(state.residual, inverse).mul_(state.support)
        rho = (state.residual * preconditioned).sum(1)
        left = (state.loss - 0.5 * rho).clamp_min(tiny)
        done = 0.5 * rho <= torch.maximum(tolerance * left, floor[rows])
        excess[rows] = torch.where(0.5 * rho <= floor[rows], 0, 0.5 * rho / state.loss.clamp_min(tiny))
        if bool(done.all()):
            break
        renewal = torch.where(done, 0, rho / state.rho.clamp_min(tiny))[:, None]
        state.direction = preconditioned.addcmul_(renewal, state.direction) if iterations else preconditioned
        state.rho = rho
        if int(done.sum()) > len(done) // 4:
            change[rows], final[rows] = state.change, state.loss
            rows, state = rows[~done], state.take(~done)
            done = done[~done]
        image = product(state.direction, matrix).mul_(state.support)
        curvature = (state.direction * image).sum(1)
        step = torch.where(done | (curvature <= 0), 0, state.rho / curvature.clamp_min(tiny)).clamp_max(1)
        state.change.addcmul_(step[:, None], state.direction)
        state.residual.addcmul_(step[:, None], image, value=-1)
        state.loss -= 0.5 * step * state.rho
    else:
        iterations, rest = max_iterations, 0.5 * (1 - step) * state.rho
        excess[rows] = torch.where(done, excess[rows], rest / state.loss.clamp_min(tiny))
    change[rows], final[rows] = state.change, state.loss
    return Iterated(change, final, excess.clamp_max(1), iterations)


@dataclass
class _State:
    """The rows that are still iterated: change, residual, direction, support [R, I]; loss and last ρ [R]."""

    change: Float[Tensor, "R I"]
    residual: Float[Tensor, "R I"]
    direction: Float[Tensor, "R I"]
    support: Float[Tensor, "R I"]
    loss: Float[Tensor, "R"]
    rho: Float[Tensor, "R"]

    def take(self, rows: Bool[Tensor, "R"]) -> _State:
        """The state of some rows only; finished rows cost nothing further."""
        return _State(*(getattr(self, item.name)[rows] for item in fields(self)))


def target_weight(
    weight: Float[Tensor, "O I"], gram: Float[Tensor, "I I"], cross: Float[Tensor, "I I"], *, alpha: float, factor: Factor
) -> Float[Tensor, "O I"]:
    """The weights that the asymmetric problem reconstructs instead of the dense ones (method sheet, 2.10).

    min ‖ŴX̂ − W(αX + (1−α)X̂)‖²/N + ‖(Ŵ−W)Λ^½‖² equals the symmetric problem on the edited inputs with
    W̃ = (W(αC + (1−α)Ĝ) + WΛ)(Ĝ + Λ)⁻¹ in the place of W.

    Args:
        weight: Dense, [O, I].
        gram: Ĝ of the edited inputs, [I, I].
        cross: C = X X̂ᵀ, dense inputs by edited inputs, at the scale of ``gram``, [I, I].
        alpha: 0 fits the dense layer on the edited inputs, 1 the output of the dense model.
        factor: ``gram`` with its damping, factorised.

    Returns:
        [O, I], in the dtype of the factor.
    """
    dense = weight.to(factor.hessian.dtype)
    shift = alpha * (cross - gram).to(dense.dtype)
    return dense + dense @ shift @ factor.inverse
