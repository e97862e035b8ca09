"""A network that rounds as it runs: the inputs of its linear layers, and the keys and values of its attention.

The steps follow from each token alone, so that what a token gives depends on no other that shares its batch, and decoding from a cache equals the whole pass:
rounding what is rounded changes nothing, so that entries which are rounded whenever they are read are as if they had been rounded when they were written.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from duramen.attention import change_kept
from duramen.grids import Cache, Format, Inputs
from duramen.problem import Problem

HOOK = "_duramen_inputs"


def round_inputs(x: Float[Tensor, "... I"], inputs: Inputs) -> Float[Tensor, "... I"]:
    """Rounds every token on the symmetric grid whose last code is the largest of those that share a step; in float32 at least, back to the type of ``x``."""
    steps = input_steps(x, inputs)
    parts = x.detach().to(steps.dtype).reshape(*steps.shape, -1)
    codes = (parts / steps[..., None]).round().clamp(inputs.grid.least, inputs.grid.most)
    return straight_through(x, (codes * steps[..., None]).view(x.shape).to(x.dtype))


def input_steps(x: Float[Tensor, "... I"], inputs: Inputs) -> Float[Tensor, "... n"]:
    """The step of every token, or of its groups of channels; 1 where all are zero.

    Raises:
        Problem: If groups do not divide the channels.
    """
    width = inputs.grid.width(x.shape[-1])
    parts = x.detach().to(torch.promote_types(x.dtype, torch.float32)).reshape(*x.shape[:-1], -1, width)
    steps = parts.abs().amax(-1) / inputs.grid.most
    return torch.where(steps > 0, steps, torch.ones_like(steps))


def round_cache(x: Float[Tensor, "B n T P"], cache: Cache, *, sinks: int) -> Float[Tensor, "B n T P"]:
    """Rounds keys or values, every token of every head on an affine grid over its range and zero; the first ``sinks`` tokens stay."""
    wide, most = x.detach().to(torch.promote_types(x.dtype, torch.float32)), 2**cache.bits - 1
    low, high = wide.amin(-1, keepdim=True).clamp_max(0), wide.amax(-1, keepdim=True).clamp_min(0)
    steps = (high - low) / most
    steps = torch.where(steps > 0, steps, torch.ones_like(steps))
    zeros = (-low / steps).round().clamp(0, most)
    rounded = ((((wide / steps).round() + zeros).clamp(0, most) - zeros) * steps).to(x.dtype)
    return straight_through(x, torch.cat([x[:, :, :sinks], rounded[:, :, sinks:]], 2))


class _StraightThrough(torch.autograd.Function):
    """Rounding, whose gradient is that of leaving things as they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream, None


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, with the gradient of ``x``; nothing is clipped where steps come from the largest value, so that it is the same everywhere."""
    return _StraightThrough.apply(x, rounded) if x.requires_grad and torch.is_grad_enabled() else rounded


def start_rounding(module: nn.Module, formats: Mapping[str, Format]) -> None:
    """Makes modules inside ``module``, by their paths, round what their formats say from here on, instead of what they rounded before."""
    for path, each in formats.items():
        try:
            target = module.get_submodule(path)
        except AttributeError:
            raise Problem(
                f"There is no module `{path}` to round in.", why="the formats are those of another model.", fix="the folder as it was written.",
            ) from None  # fmt: skip
        if each.cache is not None:
            change_kept(target, partial(_change, each.cache))
            continue
        before = target.__dict__.pop(HOOK, None)
        if before is not None:
            before[1].remove()
        if each.inputs is not None:
            target.__dict__[HOOK] = each.inputs, target.register_forward_pre_hook(partial(_round_first, each.inputs))


def take_over_rounding(before: nn.Module, after: nn.Module) -> None:
    """Makes a module that takes the place of another one round the inputs that the other one rounds."""
    if HOOK in before.__dict__:
        start_rounding(after, {"": Format(inputs=before.__dict__[HOOK][0])})


def _round_first(inputs: Inputs, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return round_inputs(args[0], inputs), *args[1:]


def _change(cache: Cache, x: Tensor, window: int | None) -> Tensor:
    return round_cache(x, cache, sinks=0 if window else cache.sinks)  # once a window has moved on, the first tokens are gone
