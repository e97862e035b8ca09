"""The selective scan of Mamba (arXiv 2312.00752): h ← exp(Δ̃A)∘h + ΔB⊗x, y = hC + D∘x, one step after another, exactly.

How far a step decays the state (Δ̃) and how much it writes (Δ) are two arguments, which are one in the dense model: a step that stands for others that
were removed before it decays for all of them and writes for itself (``fold``). The loop over time runs in chunks: decays, writes and outputs of
a chunk are computed at once, and between them one fused product a step is left. The backward pass keeps the states at the borders of the
chunks and computes the others again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

CHUNK = 16
"""Steps whose states are in memory together; so few stay in a processor's cache."""


def selective_scan(
    inputs: Float[Tensor, "B T E"],
    decay_steps: Float[Tensor, "B T E"],
    write_steps: Float[Tensor, "B T E"],
    a: Float[Tensor, "E N"],
    b: Float[Tensor, "B T N"],
    c: Float[Tensor, "B T N"],
    *,
    skip: Float[Tensor, "E"] | None = None,
    initial_state: Float[Tensor, "B E N"] | None = None,
    valid: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T E"], Float[Tensor, "B E N"]]:
    """Runs the recurrence over all steps; also over one, for decoding.

    Args:
        inputs: x, after the convolution.
        decay_steps: Δ̃, after softplus, by which the state decays.
        write_steps: Δ, after softplus, by which x is written.
        a: A, below zero.
        b: B.
        c: C.
        skip: D; None for zero.
        initial_state: h before the first step; None for zero.
        valid: Steps that count; the state holds over the others, on whatever side they are.

    Returns:
        y in the dtype of the inputs, and h after the last step in float32, or float64 if the steps are.
    """
    kind = torch.promote_types(decay_steps.dtype, torch.float32)
    decays, writes = decay_steps.to(kind), write_steps.to(kind) * inputs.to(kind)
    if valid is not None:
        decays, writes = (each * valid[..., None] for each in (decays, writes))
    state = decays.new_zeros(*decays.shape[::2], a.shape[1]) if initial_state is None else initial_state.to(kind)
    by_time = [each.transpose(0, 1).contiguous() for each in (decays, writes, b.to(kind), c.to(kind))]
    outputs, state = _Scan.apply(*by_time, a.to(kind), state)
    outputs = outputs.transpose(0, 1)
    if skip is not None:
        outputs = outputs + skip.to(kind) * inputs.to(kind)
    return outputs.to(inputs.dtype), state


class _Scan(torch.autograd.Function):
    """The recurrence over time-major tensors: Δ̃ and Δx [T, B, E], B and C [T, B, N], A [E, N], h [B, E, N]."""

    @staticmethod
    def forward(
        ctx: Any, decays: Tensor, writes: Tensor, b: Tensor, c: Tensor, a: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        outputs, borders = torch.empty_like(writes), []
        for part in _chunks(len(writes)):
            borders.append(state)
            states, _ = _states(decays[part], writes[part], b[part], a, state)
            outputs[part] = _contract(states, c[part])
            state = states[-1].clone()
        ctx.save_for_backward(decays, writes, b, c, a, *(borders if any(ctx.needs_input_grad) else ()))
        return outputs, state

    @staticmethod
    def backward(ctx: Any, by_outputs: Tensor, by_state: Tensor) -> tuple[Tensor | None, ...]:
        """Λ ← Λ∘exp(Δ̃A) + ȳ⊗C backwards in time; all else follows from Λ and the states."""
        decays, writes, b, c, a, *borders = ctx.saved_tensors
        found = [torch.empty_like(each) for each in (decays, writes, b, c)]
        by_a, carried = torch.zeros_like(a), by_state
        for part, before in reversed(list(zip(_chunks(len(writes)), borders, strict=True))):
            states, kept = _states(decays[part], writes[part], b[part], a, before)
            adjoint = by_outputs[part][..., None] * c[part][:, :, None]
            adjoint[-1] += carried
            for step in range(len(adjoint) - 2, -1, -1):
                adjoint[step].addcmul_(adjoint[step + 1], kept[step + 1])
            carried = adjoint[0] * kept[0]
            by_kept = adjoint * torch.cat([before[None], states[:-1]]) * kept
            found[0][part] = (by_kept * a).sum(-1)
            found[1][part] = _contract(adjoint, b[part])
            found[2][part] = (adjoint * writes[part][..., None]).sum(2)
            found[3][part] = (states * by_outputs[part][..., None]).sum(2)
            by_a += (by_kept * decays[part][..., None]).sum((0, 1))
        return *found, by_a, carried


def _chunks(steps: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, steps, CHUNK))


def _states(decays: Tensor, writes: Tensor, b: Tensor, a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state after every step of a chunk, and what each step keeps of the one before, [t, B, E, N] both."""
    kept = torch.mul(decays[..., None], a).exp_()
    states = writes[..., None] * b[:, :, None]
    for step in range(len(states)):
        states[step].addcmul_(state, kept[step])
        state = states[step]
    return states, kept


def _contract(states: Tensor, vectors: Tensor) -> Tensor:
    """Σ_n states·vectors, [t, B, E, N] and [t, B, N] -> [t, B, E]."""
    steps, batch, width, _ = states.shape
    return torch.bmm(states.flatten(0, 1), vectors.flatten(0, 1)[..., None]).view(steps, batch, width)
