"""State-space recurrences step by step, as they are printed."""

import torch


def selective(x, decay, write, a, b, c, state=None):
    """Mamba: x, Δ̃, Δ [B, T, E]; A [E, N]; B, C [B, T, N] -> y [B, T, E], h [B, E, N]."""
    batch, steps, width = x.shape
    h = x.new_zeros(batch, width, a.shape[1]) if state is None else state
    outputs = []
    for t in range(steps):
        h = torch.exp(decay[:, t, :, None] * a) * h + (write[:, t] * x[:, t])[..., None] * b[:, t, None]
        outputs.append((h * c[:, t, None]).sum(-1))
    return torch.stack(outputs, 1), h


def ssd(x, decay, write, a, b, c, state=None):
    """Mamba-2: x [B, T, H, P]; Δ̃, Δ [B, T, H]; A [H]; B, C [B, T, G, N] -> y [B, T, H, P], h [B, H, P, N]."""
    batch, steps, heads, width = x.shape
    b, c = (each.repeat_interleave(heads // each.shape[2], 2) for each in (b, c))
    h = x.new_zeros(batch, heads, width, b.shape[-1]) if state is None else state
    outputs = []
    for t in range(steps):
        h = torch.exp(decay[:, t] * a)[..., None, None] * h + (write[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        outputs.append((h * c[:, t, :, None]).sum(-1))
    return torch.stack(outputs, 1), h
