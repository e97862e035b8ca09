"""The scan of Mamba-2 (state-space duality, arXiv 2405.21060): one decay per head, so that a chunk of steps is a few matrix products.

Inside a chunk y = (L∘CBᵀ)(Δx) with L_ij = exp(Σ_{i ≥ t > j} Δ̃_t·A), and the state before it adds exp(Σ_{t ≤ i} Δ̃_t·A)·C h. Logarithms of decays are masked
before they are exponentiated, and nothing is divided by a decay, so that no sum of steps overflows. CBᵀ is formed once per group of heads.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

CHUNK = 64
"""Steps of a chunk; on a processor fewer than the 256 of GPU kernels are faster."""


def ssd_scan(
    inputs: Float[Tensor, "B T H P"],
    decay_steps: Float[Tensor, "B T H"],
    write_steps: Float[Tensor, "B T H"],
    a: Float[Tensor, "H"],
    b: Float[Tensor, "B T G N"],
    c: Float[Tensor, "B T G N"],
    *,
    chunk: int = CHUNK,
    skip: Float[Tensor, "H"] | None = None,
    initial_state: Float[Tensor, "B H P N"] | None = None,
    valid: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H P"], Float[Tensor, "B H P N"]]:
    """Runs h ← exp(Δ̃A)·h + Δ·x⊗B, y = hC + D·x over all steps, of any number; also over one, for decoding.

    Args:
        inputs: x, after the convolution.
        decay_steps: Δ̃, after softplus, by which the state decays.
        write_steps: Δ, after softplus, by which x is written.
        a: A, below zero.
        b: B; G groups share the heads evenly.
        c: C.
        chunk: Steps of a chunk; changes nothing but rounding and time.
        skip: D; None for zero.
        initial_state: h before the first step; None for zero.
        valid: Steps that count; the state holds over the others, on whatever side they are.

    Returns:
        y in the dtype of the inputs, and h after the last step in float32, or float64 if the steps are.
    """
    kind = torch.promote_types(decay_steps.dtype, torch.float32)
    batch, _, heads, width = inputs.shape
    groups, size = b.shape[2:]
    logs, writes = decay_steps.to(kind) * a.to(kind), write_steps.to(kind)[..., None] * inputs.to(kind)
    if valid is not None:
        logs, writes = logs * valid[..., None], writes * valid[..., None, None]
    shape = batch, groups, heads // groups, width, size
    state = logs.new_zeros(shape) if initial_state is None else initial_state.to(kind).view(shape)
    outputs = []
    for start in range(0, logs.shape[1], chunk):
        log, write, b_here, c_here = (each[:, start : start + chunk] for each in (logs, writes, b.to(kind), c.to(kind)))
        y, state = _chunk(log, write, b_here, c_here, state)
        outputs.append(y)
    found = torch.cat(outputs, 1) if outputs else torch.zeros_like(writes)
    if skip is not None:
        found = found + skip.to(kind)[:, None] * inputs.to(kind)
    return found.to(inputs.dtype), state.reshape(batch, heads, width, size)


def _chunk(logs: Tensor, writes: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [B, t, H, P] of one chunk and the state after it, [B, G, H/G, P, N]."""
    batch, steps, heads, width = writes.shape
    groups, each = state.shape[1:3]
    sums = logs.cumsum(1).view(batch, steps, groups, each).permute(0, 2, 3, 1)  # B G H/G t
    x = writes.view(batch, steps, groups, each, width).permute(0, 2, 3, 1, 4)  # B G H/G t P
    b, c = (factor.transpose(1, 2) for factor in (b, c))  # B G t N
    later = torch.ones(steps, steps, dtype=torch.bool, device=logs.device).triu(1)
    between = (sums[..., None] - sums[..., None, :]).masked_fill(later, -torch.inf).exp()
    inside = (between * (c @ b.transpose(-1, -2))[:, :, None]) @ x
    carried = sums.exp()[..., None] * (c[:, :, None] @ state.transpose(-1, -2))
    last = sums[..., -1:]
    kept = (last - sums).exp()[..., None] * x
    state = last.exp()[..., None] * state + kept.transpose(-1, -2) @ b[:, :, None]
    return (inside + carried).permute(0, 3, 1, 2, 4).reshape(batch, steps, heads, width), state
