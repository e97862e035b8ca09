"""Norms: which there are, and what they multiply by."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from duramen.families.model import BlockModel


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a leaf with one weight per channel."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1 and not list(module.children())


def gain_of(norm: nn.Module) -> tuple[Float[Tensor, "D"], float] | None:
    """By what an RMS norm multiplies every channel, in float64, and the weight with which it multiplies none; None if it is another kind of norm."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, len(weight), generator=generator).to(weight.device, weight.dtype) + 0.5
    plain = x.double() * x.double().square().mean(-1, keepdim=True).rsqrt()
    for offset in (0.0, 1.0):
        gain = weight.double() + offset
        near = torch.allclose(norm(x).double(), plain * gain, rtol=0.05, atol=0.02 * float(gain.abs().max()))
        if near and getattr(norm, "bias", None) is None:
            return gain, 1.0 - offset
    return None


def from_zero(norm: nn.Module) -> float:
    """What a norm adds to its weight before it multiplies: 1 for weights about zero, as Gemma's are, else 0."""
    root = gain_of(norm)
    return 0.0 if root is None else 1.0 - root[1]


@torch.no_grad()
def last_norm(model: BlockModel) -> str | None:
    """Path of the last norm that runs outside the blocks; None if none does."""
    ran: list[str] = []
    inside = model.family.blocks + "."
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in model.network.named_modules()
        if not name.startswith(inside) and is_norm(module)
    ]
    try:
        model.logits(torch.ones(1, 1, model.config.hidden_size, dtype=model.dtype, device=model.device))
    finally:
        for handle in handles:
            handle.remove()
    return ran[-1] if ran else None
