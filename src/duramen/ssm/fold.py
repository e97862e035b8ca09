"""Gap folding: a run of removed steps writes nothing but decays the state, and decays of one matrix A multiply, so they fold into the next step.

    Δ̃ of a kept step = the Δ of the removed steps before it + its own Δ

A scan with Δ̃ for decays and Δ for writes then gives, at the kept steps, what the scan over all steps gives with zeros at the removed ones. It holds along any
path. What Δ a removed step would have had, once its features are gone, is a choice (``removed_steps``).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

GapStep = Literal["hold", "bias", "previous", "next", "mean"]


def gaps(places: Int[Tensor, "B K"], length: int) -> tuple[Int[Tensor, "B K"], Int[Tensor, "B"]]:
    """How many steps were removed just before each kept one, and after the last.

    Args:
        places: Of the kept steps along the path, from 0, rising along each row. For another path than that of time: their ranks on it.
        length: Steps of the whole path.
    """
    before = torch.cat([places.new_full((len(places), 1), -1), places[:, :-1]], 1)
    return places - before - 1, length - 1 - places[:, -1]


def removed_steps(
    kind: GapStep,
    write_steps: Float[Tensor, "B K ..."],
    bias: Float[Tensor, "..."] | None = None,
    valid: Bool[Tensor, "B K"] | None = None,
) -> Tensor:
    """The Δ of each step that was removed just before each kept one, to be broadcast to its Δ.

    Args:
        kind: ``hold``: 0, so that the packed sequence is scanned as it is; ``bias``: softplus of the bias of Δ, which is what a zero input
            gives; ``previous`` and ``next``: that of the kept step on that side (the first has none before it, and holds); ``mean``:
            that of all kept steps of the row.
        write_steps: Δ of the kept steps, after softplus.
        bias: Of Δ, before softplus, for ``bias``.
        valid: Steps that count in the mean.
    """
    if kind == "hold":
        return torch.zeros_like(write_steps)
    if kind == "bias":
        assert bias is not None
        return torch.nn.functional.softplus(bias).expand_as(write_steps)
    if kind == "previous":
        return torch.cat([torch.zeros_like(write_steps[:, :1]), write_steps[:, :-1]], 1)
    if kind == "next":
        return write_steps
    counts = torch.ones_like(write_steps) if valid is None else _like(valid.to(write_steps), write_steps)
    return ((write_steps * counts).sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp_min(1)).expand_as(write_steps)


def fold(
    write_steps: Float[Tensor, "B K ..."], gap: Int[Tensor, "B K"], removed: Float[Tensor, "B K ..."]
) -> Float[Tensor, "B K ..."]:
    """Δ̃: each kept step's own Δ and that of the steps removed before it, all of which have the same."""
    return write_steps + _like(gap, write_steps) * removed


def fold_own(steps: Float[Tensor, "B T ..."], places: Int[Tensor, "B K"]) -> Float[Tensor, "B K ..."]:
    """Δ̃ where the removed steps still have their own Δ, as in the layer that chose them."""
    sums = steps.cumsum(1)
    at = sums.gather(1, _like(places, steps).expand(-1, -1, *steps.shape[2:]))
    return torch.cat([at[:, :1], at[:, 1:] - at[:, :-1]], 1)


def rescale(
    inputs: Float[Tensor, "B K ..."], write_steps: Float[Tensor, "B K ..."], decay_steps: Float[Tensor, "B K ..."]
) -> Float[Tensor, "B K ..."]:
    """Inputs x·Δ/Δ̃ with which a kernel that knows one Δ, given Δ̃, does the same; zero where neither decays nor writes."""
    share = torch.where(decay_steps > 0, write_steps / decay_steps.clamp_min(torch.finfo(decay_steps.dtype).tiny), 0)
    return inputs * share


def decay_state(state: Tensor, steps: Tensor, a: Tensor) -> Tensor:
    """A state after steps that only decay it: [B, E, N] with steps [B, E] and A [E, N], or [B, H, P, N] with [B, H] and [H]."""
    logs = steps[..., None] * a if a.ndim == 2 else (steps * a)[..., None, None]
    return state * logs.exp()


def _like(values: Tensor, other: Tensor) -> Tensor:
    """Values [B, K] with as many axes as another tensor."""
    return values.view(*values.shape, *[1] * (other.ndim - 2))
