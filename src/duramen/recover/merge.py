"""Merging an adapter into its weight without losing what the weight is: a zero, a pattern. And changing an adapter's rank without changing what it does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from duramen.problem import Exit, Problem
from duramen.recover.adapters import Adapter


@dataclass(frozen=True)
class Merged:
    """A merged weight, [O, I], and the largest difference of outputs from those of the unmerged layer, as a share of the largest output."""

    weight: Float[Tensor, "O I"]
    difference: float


@torch.no_grad()
def merge(name: str, adapter: Adapter, x: Float[Tensor, "... I"], *, tolerance: float) -> Merged:
    """The merged weight, checked.

    Args:
        name: For errors.
        adapter: The layer with its change.
        x: Some of its inputs.
        tolerance: Largest difference of outputs, as a share of the largest.

    Raises:
        Problem: If a removed weight would come back, or the outputs differ by more.
    """
    weight = adapter.merged()
    if isinstance(adapter.kept, Tensor):
        check_zeros(name, weight, adapter.kept)
    expected = adapter(x).float()
    bias = adapter.base.bias
    found = torch.nn.functional.linear(x, weight, bias if isinstance(bias, Tensor) else None).float()
    difference = float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-30)
    if difference > tolerance:
        raise Problem(
            f"Merging {name} changes its outputs by {difference:.2g} of the largest one.",
            why=f"the weight is stored in {weight.dtype}, whose rounding should change them by {tolerance:.2g} at most.",
            fix="keep the adapter beside the weight, or store the model in float32.",
            code=Exit.CHECK_FAILED,
        )
    return Merged(weight, difference)


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
            fix="`mode: masked` or `spp`, whose merge keeps every zero; or keep the adapter beside the weight.",
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
