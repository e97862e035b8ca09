"""Merging an adapter into its weight without losing what the weight is: a zero, a pattern. And changing an adapter's rank without changing what it does."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from duramen.problem import Exit, Problem


@torch.no_grad()
def check_outputs(
    name: str,
    weight: Float[Tensor, "O I"],
    bias: Tensor | None,
    x: Float[Tensor, "N I"],
    y: Float[Tensor, "N O"],
    *,
    tolerance: float,
) -> float:
    """The largest difference of a merged layer's outputs from those of the unmerged one, as a share of the largest.

    Args:
        name: For errors.
        weight: The merged weight, as stored.
        bias: The layer's, [O].
        x: Some inputs.
        y: What the layer with its adapter made of them.
        tolerance: How large it may be.

    Raises:
        Problem: If it is larger.
    """
    found = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)).float()
    difference = float((found - y.float()).abs().max()) / max(float(y.float().abs().max()), 1e-30)
    if not difference <= tolerance:
        raise Problem(
            f"Merging {name} changes its outputs by {difference:.2g} of the largest one.",
            why=f"the weight is stored in {weight.dtype}, whose rounding should change them by {tolerance:.2g} at most.",
            fix="`dtype: float32`, and a model that is stored in float32.",
            code=Exit.CHECK_FAILED,
        )
    return difference


def check_zeros(name: str, weight: Float[Tensor, "O I"], kept: Bool[Tensor, "O I"]) -> None:
    """Stops if a removed weight came back.

    Raises:
        Problem: If one did.
    """
    back = int((weight.masked_fill(kept, 0) != 0).sum())
    if back:
        raise Problem(
            f"Merging into {name} would fill {back:,} of {int((~kept).sum()):,} removed weights.",
            why="its adapter was trained without the mask.",
            fix="`mode: masked` or `spp`, whose merge keeps every zero.",
            code=Exit.CHECK_FAILED,
        )


def resize(
    a: Float[Tensor, "r I"], b: Float[Tensor, "O r"], gamma: float, *, rank: int, new_gamma: float
) -> tuple[Float[Tensor, "k I"], Float[Tensor, "O k"]]:
    """The best factors of another rank for the same γBA, under another γ: an SVD of the small core between two QR factorisations.

    Raises:
        Problem: If the rank is not at least 1.
    """
    if rank < 1:
        raise Problem(f"A rank of {rank} is none.", why="an adapter has at least one direction.", fix="`rank: 1` or more.")
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(gamma * r_b @ r_a.T)
    k = min(rank, len(s))
    root = (s[:k] / new_gamma).sqrt()
    new_a, new_b = a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank)
    new_a[:k] = root[:, None] * (v[:k] @ q_a.T)
    new_b[:, :k] = (q_b @ u[:, :k]) * root
    return new_a, new_b


def weighted_svd(
    error: Float[Tensor, "O I"], gram: Float[Tensor, "I I"], rank: int
) -> tuple[Float[Tensor, "O r"], Float[Tensor, "r I"]]:
    """B and A of the best change of a rank: min ‖(E − BA) G^½‖, E what is missing; its error is that of the singular values left out.

    Δ = SVD_r(E G^½) G^{−½} (ours; method sheet, 2.7). Directions that no input takes stay out.

    Args:
        error: E.
        gram: G.
        rank: r, at most min(O, I).
    """
    values, vectors = torch.linalg.eigh(gram.double())
    alive = values > 1e-12 * values[-1].clamp_min(1e-300)
    roots = values.clamp_min(0).sqrt()
    inverse = torch.where(alive, 1 / roots.clamp_min(1e-150), torch.zeros_like(roots))
    u, s, v = torch.linalg.svd(error.double() @ (vectors * roots) @ vectors.T, full_matrices=False)
    root = s[:rank].sqrt()
    back = (vectors * inverse) @ vectors.T
    return (u[:, :rank] * root).to(error.dtype), (root[:, None] * (v[:rank] @ back)).to(error.dtype)
