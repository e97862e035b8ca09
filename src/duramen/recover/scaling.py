"""How strongly an adapter counts at a given rank, and the learning rate that goes with it.

"RoRA" (Liu et al., arXiv 2501.04315) scales the adapter by α/√r instead of LoRA's α/r; rsLoRA (Kalajdzievski, arXiv 2312.03732) had the same
scale before. With gradient steps the first step then lowers the loss by as much at any rank. With Adam, which does not see the scale of a
gradient, the scale acts as a learning rate of B: RoRA(α, r) is LoRA(α/r) with √r times the rate on B, exactly, where neither ε
nor clipping interferes (our derivation; method sheet, 2.3).
"""

from __future__ import annotations

import math
from typing import Literal

from jaxtyping import Float
from torch import Tensor

Rule = Literal["alpha_over_sqrt_r", "alpha_over_r", "constant"]
Optimizer = Literal["adamw", "sgd"]
REFERENCE = 64.0
"""γ·r at which a reference rate holds: that of the published LoRA setting, α = 64 at r = 32."""


def scale(alpha: float, rank: int, rule: Rule = "alpha_over_sqrt_r") -> float:
    """γ, by which the product of the two factors is multiplied."""
    return alpha / {"alpha_over_sqrt_r": math.sqrt(rank), "alpha_over_r": rank, "constant": 1}[rule]


def coupled_rate(
    rate: float, gamma: float, rank: int, *, optimizer: Optimizer = "adamw", reference: float = REFERENCE
) -> float:
    """The rate at which the first step lowers the loss as much as ``rate`` does at γ·r = ``reference`` (ours; method sheet, 2.4).

    AdamW's first step lowers it by ηγr, that of gradient descent by ηγ²r. With gradient descent the reference is γ²·r.
    """
    return rate * reference / (gamma * rank if optimizer == "adamw" else gamma**2 * rank)


def first_step_decrease(
    gradient: Float[Tensor, "O I"], a: Float[Tensor, "r I"], gamma: float, *, optimizer: Optimizer
) -> float:
    """By how much the first step lowers the loss to first order, per unit of learning rate.

    Only B moves, since it starts at zero: against its gradient γΓAᵀ, or by its sign under Adam.

    Args:
        gradient: Γ of the loss by the whole weight.
        a: A at the start.
        gamma: γ.
        optimizer: ``sgd`` or ``adamw``.
    """
    by_b = gradient @ a.T
    return float(gamma**2 * by_b.square().sum() if optimizer == "sgd" else gamma * by_b.abs().sum())
