"""A linear layer whose rows have four or eight bits and whose inputs few, all with learned steps, and of which a sub-network takes the first rows and columns.

In "Quasar-ViT" (Li et al., ICS 2024, arXiv 2407.18175) one latent matrix serves every width and both numbers of bits. The product is that of the codes, whole numbers that float32 adds exactly, and only
then rescaled, so that the layer gives in training what integers give afterwards, bit for bit. Gradients are those of learned step sizes (Esser et al., "LSQ", arXiv 1902.08153).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import linear

from duramen.grids import Grid
from duramen.quantize.rows import EIGHT, EXACT, FOUR, MixedRows, choose_rows, row_gain
from duramen.quantize.steps import choose_steps
from duramen.rounding import straight_through

GAUSSIAN = (0.3385, 0.0308)
"""The best steps of four and of eight bits for normal numbers, in their deviation."""
SEEN_AT_MOST = 65_536
"""Inputs by which a step is chosen."""


def learned_codes(x: Tensor, step: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """x/step on a grid, as floats that are whole; outside the grid the gradient of x is zero."""
    scaled = torch.clamp(x / step, low, high)  # type: ignore[arg-type]
    return straight_through(scaled, scaled.detach().round())


def slowed(step: Tensor, count: int, most: int) -> Tensor:
    """The same step, whose gradient is divided by √(n·Q): n numbers share it, and Q is the last code."""
    return straight_through(step * (count * most) ** -0.5, step.detach())


class InputStep(nn.Module):
    """Rounds activations by one step, whatever the token.

    Attributes:
        grid: Signed, or from zero up for what is never negative.
        log_step: Its logarithm is what is learned.
        seen: Numbers that passed, while they are collected; None otherwise.
    """

    def __init__(self, bits: int, *, signed: bool = True) -> None:
        super().__init__()
        self.grid = Grid(bits, affine=not signed)
        self.log_step = nn.Parameter(torch.tensor(-2.0))
        self.seen: list[Tensor] | None = None

    def step(self) -> Float[Tensor, ""]:
        """α."""
        return self.log_step.exp()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of the same shape, and the step; of a batch [B, ...], whose gradients add up however it is divided."""
        step = slowed(self.step(), x[0].numel(), self.grid.most)
        return learned_codes(x, step, self.grid.least, self.grid.most), step

    def look(self, x: Tensor) -> None:
        """Keeps some of what passes, if it is collected."""
        if self.seen is not None:
            flat = x.detach().flatten()
            self.seen.append(flat[:: max(1, len(flat) // 8192)].cpu())

    @torch.no_grad()
    def settle(self) -> None:
        """Takes the step of least squared error for what was collected."""
        if self.seen:
            values = torch.cat(self.seen)
            values = values[:: max(1, len(values) // SEEN_AT_MOST)].float()[None]
            steps, _ = (
                choose_steps(values, self.grid, "mse") if not self.grid.affine else (_unsigned_step(values, self.grid), None)
            )
            self.log_step.fill_(float(steps.clamp_min(1e-8).log()))
        self.seen = None


def _unsigned_step(values: Tensor, grid: Grid) -> Tensor:
    """Of numbers that are not negative, the share of the largest one's step with the least squared error."""
    whole = values.amax().clamp_min(1e-8) / grid.most
    shares = torch.linspace(0.1, 1.2, 56)
    errors = [
        ((values / (whole * share)).round().clamp(0, grid.most) * whole * share - values).square().sum() for share in shares
    ]
    return whole * shares[int(torch.stack(errors).argmin())]


@dataclass(frozen=True)
class Chosen:
    """A matrix on its two grids, for one sub-network.

    Attributes:
        codes: [O, I]; whole, but floats, with gradients.
        steps: Of every row, [O].
        eight: Which rows have eight bits, [O].
    """

    codes: Float[Tensor, "O I"]
    steps: Float[Tensor, "O"]
    eight: Bool[Tensor, "O"]


class MixedLinear(nn.Module):
    """A latent matrix, of which any first rows and columns can be taken, and any share of the rows at eight bits.

    A row's step is γ·rms of what is taken of it, with a learned γ for each number of bits. One order of rows by gain serves all sub-networks, so that the rows of eight bits of a larger share contain those of a smaller.

    Args:
        inputs: I.
        outputs: O, of all parts.
        bits: Of inputs.
        parts: Blocks of rows of which the first of each are taken, as queries, keys and values are.

    Attributes:
        weight: [O, I].
        bias: [O].
        log_gamma: Of four and of eight bits, [2, O].
        gain: Of eight bits instead of four, at the full width, [O]; the order of rows.
        inputs: How inputs are rounded.
        gram: XXᵀ of the inputs that passed, while it is collected, [I, I]; None otherwise.
    """

    gain: Tensor

    def __init__(self, inputs: int, outputs: int, bits: int, *, parts: int = 1) -> None:
        super().__init__()
        self.parts = parts
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.log_gamma = nn.Parameter(torch.tensor(GAUSSIAN).log()[:, None].repeat(1, outputs))
        self.inputs = InputStep(bits)
        self.register_buffer("gain", torch.ones(outputs))
        self.gram: Tensor | None = None

    def taken(self, values: Tensor, outputs: int, axis: int = 0) -> Tensor:
        """The rows of a sub-network with so many."""
        whole = values.shape[axis] // self.parts
        kept = [values.narrow(axis, part * whole, outputs // self.parts) for part in range(self.parts)]
        return kept[0] if len(kept) == 1 else torch.cat(kept, axis)

    def eight_rows(self, outputs: int, share: float) -> Bool[Tensor, "O"]:
        """Which rows of a sub-network have eight bits: ⌊share·O + ½⌋ first ones of the order, but none that eight bits do not help."""
        return choose_rows(self.taken(self.gain, outputs), share)

    def chosen(self, inputs: int, outputs: int, share: float) -> Chosen:
        """The matrix of a sub-network on its grids."""
        weight = self.taken(self.weight, outputs)[:, :inputs]
        eight = self.eight_rows(outputs, share)
        gammas = self.taken(self.log_gamma, outputs, 1).exp()
        size = weight.detach().square().mean(1).sqrt()
        gamma = torch.where(eight, slowed(gammas[1], inputs, EIGHT.most), slowed(gammas[0], inputs, FOUR.most))
        steps = gamma * torch.where(size > 0, size, torch.ones_like(size))
        low, high = (
            torch.where(eight, float(wide), float(narrow))[:, None]
            for wide, narrow in ((EIGHT.least, FOUR.least), (EIGHT.most, FOUR.most))
        )
        return Chosen(learned_codes(weight, steps[:, None], low, high), steps, eight)

    def forward(self, x: Float[Tensor, "... I"], outputs: int, share: float, *, rounding: bool) -> Float[Tensor, "... O"]:
        """[..., I] -> [..., O].

        Args:
            x: Inputs, of a sub-network's width.
            outputs: Rows to take.
            share: Of them at eight bits.
            rounding: Whether anything is rounded.
        """
        self.inputs.look(x)
        if self.gram is not None:
            flat = x.detach().reshape(-1, x.shape[-1]).double()
            self.gram = self.gram + flat.T @ flat
        bias = self.taken(self.bias, outputs)
        if not rounding:
            return linear(x, self.taken(self.weight, outputs)[:, : x.shape[-1]], bias)
        chosen, (codes, step) = self.chosen(x.shape[-1], outputs, share), self.inputs(x)
        result: Tensor = linear(codes, chosen.codes) * (chosen.steps * step) + bias
        return result

    @torch.no_grad()
    def settle(self, gram: Float[Tensor, "I I"]) -> None:
        """Takes the best steps of the weights, and the order of rows, for inputs of this Gram."""
        weight, gram = self.weight.detach().float(), gram.float()
        size = weight.square().mean(1).sqrt()
        for number, grid in enumerate((FOUR, EIGHT)):
            steps, _ = choose_steps(weight, grid, "weighted", gram.diagonal())
            gamma = torch.where(size > 0, steps[:, 0] / size, torch.full_like(size, GAUSSIAN[number]))
            self.log_gamma[number] = gamma.clamp_min(1e-8).log()
        self.gain.copy_(row_gain(weight, gram))

    @torch.no_grad()
    def take_from(self, other: MixedLinear) -> None:
        """Becomes the first rows and columns of a larger one."""
        outputs, inputs = self.weight.shape
        self.weight.copy_(other.taken(other.weight, outputs)[:, :inputs])
        self.bias.copy_(other.taken(other.bias, outputs))
        self.gain.copy_(other.taken(other.gain, outputs))
        self.log_gamma.copy_(other.taken(other.log_gamma, outputs, 1))
        self.inputs.log_step.copy_(other.inputs.log_step)

    @torch.no_grad()
    def integers(self, share: float, scale: Float[Tensor, "O"] | None = None) -> tuple[MixedRows, float, Float[Tensor, "O"]]:
        """Codes and steps of the whole matrix, the step of its inputs, and its bias; a scale of the outputs is folded into both.

        Args:
            share: Of the rows at eight bits.
            scale: By which outputs are multiplied, as a layer scale does.
        """
        chosen = self.chosen(self.weight.shape[1], len(self.weight), share)
        scale = torch.ones_like(self.bias) if scale is None else scale
        mixed = MixedRows(chosen.codes.to(torch.int8), chosen.steps * scale, chosen.eight)
        return mixed, float(self.inputs.step()), self.bias * scale


def widest_exact(bits: int) -> int:
    """Inputs of so many bits that a row of eight bits can have before float32 no longer adds their products exactly."""
    return EXACT // (128 << (bits - 1))
