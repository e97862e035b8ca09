"""A linear layer whose weights are on a grid in every pass, while the weights behind them and their steps are learned.

Learned step sizes (Esser et al., "LSQ", arXiv 1902.08153): with v = w/α, clipped to the grid and rounded, dŵ/dw is 1 inside the grid and 0 outside, and dŵ/dα is round(v) − v
inside and the last code outside; the gradient of a step is divided by √(n·Q), n the weights that share it. What is learned of a step is its logarithm, so that it stays
positive and one rate of change suits all of them (ours). Steps are rounded to the type that they will be stored in, in every pass.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from duramen.grids import Grid, Quantized, encode, pack
from duramen.quantize.steps import rounded_to
from duramen.rounding import straight_through


class _OnGrid(torch.autograd.Function):
    """α·(codes − zeros); the codes are made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, steps: Tensor, zeros: Tensor | None, grid: Grid) -> Tensor:
        ctx.save_for_backward(weight, steps, zeros)
        ctx.grid = grid
        return (encode(weight, steps, zeros, grid).view(*steps.shape, -1) * steps[:, :, None]).view_as(weight)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        weight, steps, zeros = ctx.saved_tensors
        grid: Grid = ctx.grid
        scaled = weight.view(*steps.shape, -1) / steps[:, :, None]
        zero = torch.zeros_like(steps) if zeros is None else zeros
        low, high = grid.least - zero[:, :, None], grid.most - zero[:, :, None]
        inside = (scaled >= low) & (scaled <= high)
        codes = scaled.round().clamp(low, high)
        grouped = upstream.view_as(scaled)
        by_weight = (grouped * inside).view_as(weight)
        by_step = (grouped * (codes - scaled * inside)).sum(-1)
        shared = weight.numel() if grid.share == "tensor" else scaled.shape[-1]
        return by_weight, by_step / (shared * max(grid.most, 1)) ** 0.5, None, None


def on_grid(
    weight: Float[Tensor, "O I"], steps: Float[Tensor, "O n"], zeros: Float[Tensor, "O n"] | None, grid: Grid
) -> Float[Tensor, "O I"]:
    """The nearest points of the grid, with the gradients of learned steps."""
    result: Tensor = _OnGrid.apply(weight, steps, zeros, grid)
    return result


class LearnedLinear(nn.Module):
    """Stands where a linear layer stood.

    Attributes:
        base: The layer; its bias stays.
        latent: The weight behind the codes, [O, I] in float32.
        log_steps: Of the steps, [O, n], or [1, 1] where the matrix shares one; None where the weight is not rounded.
        zeros: The codes of zero of an affine grid, [O, n].
        pruned: Weights that stay zero, bool [O, I]; None in a dense layer.
        grid: None where the weight is not rounded.
    """

    def __init__(
        self,
        base: nn.Module,
        weight: Float[Tensor, "O I"],
        start: tuple[Tensor, Tensor | None] | None,
        *,
        grid: Grid | None,
        step_type: torch.dtype,
        pruned: Bool[Tensor, "O I"] | None,
    ) -> None:
        super().__init__()
        self.base, self.grid, self.step_type = base.requires_grad_(False), grid, step_type
        self.latent = nn.Parameter(weight.float().clone())
        self.log_steps: nn.Parameter | None = None
        steps, zeros = start if start is not None else (None, None)
        if steps is not None:
            assert grid is not None
            alone = steps[:1, :1] if grid.share == "tensor" else steps
            self.log_steps = nn.Parameter(alone.float().log())
        self.register_buffer("zeros", None if zeros is None else zeros.float(), persistent=False)
        self.register_buffer("pruned", pruned, persistent=False)

    def steps(self) -> Float[Tensor, "O n"]:
        """As they will be stored, with the gradient of what they are rounded from."""
        assert self.log_steps is not None
        steps = self.log_steps.exp()
        return straight_through(steps, rounded_to(steps.detach(), self.step_type)).expand(len(self.latent), -1)

    def kept(self) -> Float[Tensor, "O I"]:
        """The weight behind the codes, zero where it must be."""
        return self.latent if self.pruned is None else self.latent.masked_fill(self.pruned, 0)  # type: ignore[arg-type]

    def weight(self) -> Float[Tensor, "O I"]:
        """On the grid."""
        latent = self.kept()
        return latent if self.grid is None else on_grid(latent, self.steps(), self.zeros, self.grid)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return nn.functional.linear(x, self.weight().to(x.dtype), None if bias is None else bias.to(x.dtype))

    @torch.no_grad()
    def quantized(self) -> Quantized | None:
        """The codes; None where the weight is not rounded."""
        if self.grid is None:
            return None
        steps = self.steps().contiguous()
        zeros: Tensor | None = self.zeros  # type: ignore[assignment]
        return pack(encode(self.kept(), steps, zeros, self.grid), steps.to(self.step_type), zeros, self.grid)
