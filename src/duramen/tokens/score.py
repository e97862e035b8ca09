"""How much each token matters to a scan, from what its layer computed.

Equation 5 of "Rethinking Token Reduction for State Space Models" (arXiv 2410.14725) takes the mean of the positive outputs (``clip``). Removing a token from
a scan takes its write Δ·x⊗B away and nothing else, so the size of the write (``write``), or of its step alone (``delta``), says directly what is lost; a token
whose steps are near zero neither writes nor decays.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Score = Literal["delta", "write", "clip", "l1", "l2", "sum", "random"]


def importance(
    kind: Score,
    *,
    outputs: Float[Tensor, "B T ..."],
    write_steps: Float[Tensor, "B T ..."],
    inputs: Float[Tensor, "B T ..."],
    b: Float[Tensor, "B T ..."],
    seed: int = 0,
) -> Float[Tensor, "B T"]:
    """Scores every token; in float32.

    Args:
        kind: ``delta``: ‖Δ‖ over channels or heads; ``write``: Σ Δ·‖x‖·‖B‖ over channels or heads; ``clip``: the mean of max(0, y); ``l1``,
            ``l2`` and ``sum`` of y; ``random`` for comparison.
        outputs: y of the scan, [B, T, E] or [B, T, H, P].
        write_steps: Δ after softplus, [B, T, E] or [B, T, H].
        inputs: x after the convolution, [B, T, E] or [B, T, H, P].
        b: B, [B, T, N] or [B, T, G, N].
        seed: Of ``random``.
    """
    if kind == "random":
        drawn = torch.rand(outputs.shape[:2], generator=torch.Generator().manual_seed(seed))
        return drawn.to(outputs.device)
    if kind == "delta":
        return _norm(write_steps)
    if kind == "write":
        sizes = inputs.float().abs() if inputs.ndim == write_steps.ndim else _norm(inputs)
        written = write_steps.float() * sizes
        if b.ndim == 3:
            return written.sum(-1) * _norm(b)
        return (written.view(*b.shape[:3], -1).sum(-1) * _norm(b)).sum(-1)
    y = outputs.float().flatten(2)
    if kind == "clip":
        return y.clamp_min(0).mean(-1)
    if kind == "sum":
        return y.sum(-1)
    return _norm(y, 1 if kind == "l1" else 2)


def _norm(values: Tensor, order: int = 2) -> Tensor:
    """Norm over the last axis, in float32."""
    found: Tensor = torch.linalg.vector_norm(values.float(), order, dim=-1)
    return found
