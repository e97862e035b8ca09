"""Linear layers with a low-rank change beside their weight: y = x Wᵀ + γ (x Aᵀ) Bᵀ, and forms that keep a sparse weight sparse.

A change that is masked only after training throws most of itself away. *Masked* (MaskLoRA of arXiv 2312.15230, SparsePEFT of arXiv 2410.03750)
masks it in every forward pass, so that merging changes nothing. *Grid* (QA-LoRA's aim, arXiv 2309.14717, by rounding in every pass)
rounds the changed weight to the steps that the layer has, so that what is merged are codes. *SPP* (arXiv 2405.16057) multiplies the weights that are there. *DoRA*
(arXiv 2402.09353) learns the length of every row apart.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from duramen.grids import Quantized, encode, pack
from duramen.quantize.learned import on_grid

Mode = Literal["side", "masked", "spp", "grid"]
Start = Literal["zero", "pissa"]
OVERSAMPLED, ITERATIONS = 10, 4
"""Directions beyond the rank, and passes, by which the strongest ones are found."""


Factors = tuple[Tensor, Tensor]
"""A [r, I] and B [O, r]."""


def side_linear(
    x: Float[Tensor, "... I"],
    weight: Float[Tensor, "O I"],
    a: Float[Tensor, "r I"],
    b: Float[Tensor, "O r"],
    gamma: float,
    start: Factors | None = None,
) -> Float[Tensor, "... O"]:
    """Outputs x (W + γ(BA − B₀A₀))ᵀ along two or three paths; no product of factors is formed."""
    y = nn.functional.linear(x, weight) + (gamma * (x @ a.T.to(x.dtype))) @ b.T.to(x.dtype)
    if start is None:
        return y
    before, after = (factor.T.to(x.dtype) for factor in start)
    return y - (gamma * (x @ before)) @ after


def masked_linear(
    x: Float[Tensor, "... I"],
    weight: Float[Tensor, "O I"],
    kept: Bool[Tensor, "O I"],
    a: Float[Tensor, "r I"],
    b: Float[Tensor, "O r"],
    gamma: float,
    start: Factors | None = None,
) -> Float[Tensor, "... O"]:
    """Outputs x (W + M⊙γ(BA − B₀A₀))ᵀ, M = ``kept``. The changed weight is formed in both passes and kept in neither."""
    result: Tensor = _Masked.apply(x, weight, kept, a, b, gamma, start)
    return result


class _Masked(torch.autograd.Function):
    """dx = g Ŵ; with S = M⊙(gᵀx): dB = γ S Aᵀ, dA = γ Bᵀ S."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, kept: Tensor, a: Tensor, b: Tensor, gamma: float, start: Factors | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, kept, a, b)
        ctx.gamma, ctx.start = gamma, start
        return nn.functional.linear(x, changed(weight, kept, a, b, gamma, start))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, kept, a, b = ctx.saved_tensors
        by_x = upstream @ changed(weight, kept, a, b, ctx.gamma, ctx.start) if ctx.needs_input_grad[0] else None
        sums = (upstream.flatten(0, -2).T @ x.flatten(0, -2)).to(a.dtype).masked_fill_(~kept, 0)
        return by_x, None, None, ctx.gamma * (b.T @ sums), ctx.gamma * (sums @ a.T), None, None


def changed(
    weight: Float[Tensor, "O I"],
    kept: Bool[Tensor, "O I"] | None,
    a: Float[Tensor, "r I"],
    b: Float[Tensor, "O r"],
    gamma: float,
    start: Factors | None = None,
) -> Float[Tensor, "O I"]:
    """W + [M⊙]γ(BA − B₀A₀), added up in the type of the factors and rounded once."""
    kind = torch.promote_types(a.dtype, weight.dtype)
    found = torch.addmm(weight.to(kind), b.to(kind), a.to(kind), alpha=gamma)
    if start is not None:
        found = torch.addmm(found, start[1].to(kind), start[0].to(kind), alpha=-gamma)
    return (found if kept is None else found.masked_fill_(~kept, 0)).to(weight.dtype)


def principal_factors(weight: Float[Tensor, "O I"], rank: int, gamma: float, seed: int) -> Factors:
    """A and B with γBA the r strongest directions of a weight (PiSSA, arXiv 2404.02948), by randomised subspace iteration."""
    devices = [weight.device] if weight.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(weight.float(), q=min(rank + OVERSAMPLED, *weight.shape), niter=ITERATIONS)
    root = (s[:rank] / gamma).sqrt()
    return (v[:, :rank] * root).T.contiguous(), (u[:, :rank] * root).contiguous()


def spp_linear(
    x: Float[Tensor, "... I"], weight: Float[Tensor, "O I"], a: Float[Tensor, "r I"], beta: Float[Tensor, "O"], strength: float
) -> Float[Tensor, "... O"]:
    """Outputs x (W⊙(1 + s·β·RA))ᵀ: rows of W in r slices, every slice with one row of A; no product of the weight's size is kept."""
    slices = [
        nn.functional.linear(x * row.to(x.dtype), part) for row, part in zip(a, torch.tensor_split(weight, len(a)), strict=True)
    ]
    return nn.functional.linear(x, weight) + strength * beta.to(x.dtype) * torch.cat(slices, -1)


def spp_weight(
    weight: Float[Tensor, "O I"], a: Float[Tensor, "r I"], beta: Float[Tensor, "O"], strength: float
) -> Float[Tensor, "O I"]:
    """W⊙(1 + s·β·RA), rounded once; zeros stay."""
    rows = torch.cat([row.expand(len(part), -1) for row, part in zip(a, torch.tensor_split(weight, len(a)), strict=True)])
    return (weight.to(a.dtype) * (1 + strength * beta[:, None] * rows)).to(weight.dtype)


class Adapter(nn.Module):
    """A frozen linear layer with its low-rank change.

    Attributes:
        base: The layer; its weight is [O, I], or [I, O] in a Conv1D.
        kept: Where the weight may be other than zero, bool [O, I]; None for a dense one.
        codes: Those that the weight stands for, whose steps stay; None for a weight that was not rounded, or is not to stay so.
        gamma: γ; the strength s in ``spp``.
        a: [r, I] in float32; uniform in ±1/√I at the start, as in LoRA.
        b: [O, r], zeros at the start; in ``spp`` β, [O].
        start: A₀ and B₀, whose product is taken off, so that the layer begins as it is wherever A and B begin; None if B begins at zero.
        length: DoRA's row lengths, [O]; None without them.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int,
        gamma: float,
        mode: Mode,
        kept: Tensor | None = None,
        lengths: bool = False,
        codes: Quantized | None = None,
        start: Start = "zero",
        seed: int = 0,
        transposed: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base, self.gamma, self.mode, self.transposed = base.requires_grad_(False), gamma, mode, transposed
        self.register_buffer("kept", kept, persistent=False)
        self.codes = codes
        outputs, inputs = self.weight.shape
        uniform = (2 * torch.rand(rank, inputs, generator=generator) - 1) / inputs**0.5
        self.a = nn.Parameter(uniform.to(self.weight.device))
        self.b = nn.Parameter(self.a.new_zeros(outputs) if mode == "spp" else self.a.new_zeros(outputs, rank))
        self.start: Factors | None = None
        if start == "pissa":
            self.start = principal_factors(self.weight, rank, gamma, seed)
            self.a.data, self.b.data = (factor.clone() for factor in self.start)
        self.length = nn.Parameter(_row_lengths(self.weight)) if lengths else None

    @property
    def weight(self) -> Tensor:
        """The frozen weight, [O, I]."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight.T if self.transposed else weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        if self.mode == "spp":
            y = spp_linear(x, self.weight, self.a, self.b, self.gamma)
        elif self.mode == "masked":
            assert isinstance(self.kept, Tensor)
            y = masked_linear(x, self.weight, self.kept, self.a, self.b, self.gamma, self.start)
        elif self.mode == "grid":
            y = nn.functional.linear(x, self._changed().to(x.dtype))
        else:
            y = side_linear(x, self.weight, self.a, self.b, self.gamma, self.start)
        if self.length is not None:
            with torch.no_grad():
                lengths = _row_lengths(self._changed())
            y = y * (self.length / lengths).to(y.dtype)
        bias = self.base.bias
        return y if bias is None else y + bias  # type: ignore[operator]

    def _changed(self, weight: Tensor | None = None) -> Tensor:
        found = self._shifted(weight)
        return on_grid(found, *self._steps(found), self.codes.grid) if self.codes else found

    def _shifted(self, weight: Tensor | None = None) -> Tensor:
        """With the change, before any rounding to a grid."""
        weight = self.weight if weight is None else weight
        weight = weight if weight.dtype == torch.float64 else weight.float()
        if self.mode == "spp":
            return spp_weight(weight, self.a, self.b, self.gamma)
        kept = self.kept if self.mode != "side" else None
        return changed(weight, kept, self.a, self.b, self.gamma, self.start)  # type: ignore[arg-type]

    def _steps(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        assert self.codes is not None
        zeros = self.codes.zeros
        return self.codes.steps.to(like), None if zeros is None else zeros.to(like)

    @torch.no_grad()
    def quantized(self, weight: Float[Tensor, "O I"] | None = None) -> Quantized | None:
        """The codes with the change; None where the weight has none.

        Args:
            weight: The weight as stored, if the layer runs in another type.
        """
        if self.codes is None:
            return None
        found = self._shifted(weight)
        steps, zeros = self._steps(found)
        return pack(encode(found, steps, zeros, self.codes.grid), self.codes.steps.to(found.device), zeros, self.codes.grid)

    @torch.no_grad()
    def merged(self, weight: Float[Tensor, "O I"] | None = None) -> Float[Tensor, "O I"]:
        """The weight with its change, added up in float32 and rounded once to the type of the weight.

        Args:
            weight: The weight as stored, if the layer runs in another type.
        """
        found = self._changed(weight)
        if self.length is not None:
            found = found * (self.length / _row_lengths(found))[:, None]
        merged: Tensor = found.to((self.weight if weight is None else weight).dtype)
        return merged


def _row_lengths(weight: Tensor) -> Tensor:
    """Norm of every row, no less than a hair, [O] in float32."""
    lengths: Tensor = torch.linalg.vector_norm(weight.float(), dim=1).clamp_min(1e-12)
    return lengths
