"""A network that rounds as it runs: the inputs of its linear layers, and the keys and values of its attention.

The steps follow from each token alone, so that what a token gives depends on no other that shares its batch, and decoding from a cache equals the whole pass:
rounding what is rounded changes nothing, so that entries which are rounded whenever they are read are as if they had been rounded when they were written.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from duramen.grids import Cache, Format, Inputs
from duramen.problem import Exit, Problem

PREFIX = "duramen_"
"""How the names begin under which transformers finds attention that rounds."""
HOOK, KEPT = "_duramen_inputs", "_duramen_cache"


def round_inputs(x: Float[Tensor, "... I"], inputs: Inputs) -> Float[Tensor, "... I"]:
    """Rounds every token on the symmetric grid whose last code is the largest of those that share a step; in float32 at least, back to the type of ``x``."""
    steps = input_steps(x, inputs)
    parts = x.to(steps.dtype).reshape(*steps.shape, -1)
    codes = (parts / steps[..., None]).round().clamp(inputs.grid.least, inputs.grid.most)
    return (codes * steps[..., None]).view(x.shape).to(x.dtype)


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
    wide, most = x.to(torch.promote_types(x.dtype, torch.float32)), 2**cache.bits - 1
    low, high = wide.amin(-1, keepdim=True).clamp_max(0), wide.amax(-1, keepdim=True).clamp_min(0)
    steps = (high - low) / most
    steps = torch.where(steps > 0, steps, torch.ones_like(steps))
    zeros = (-low / steps).round().clamp(0, most)
    rounded = (((wide / steps).round() + zeros).clamp(0, most) - zeros) * steps
    return torch.cat([x[:, :, :sinks], rounded[:, :, sinks:].to(x.dtype)], 2) if sinks else rounded.to(x.dtype)


def start_rounding(module: nn.Module, formats: Mapping[str, Format]) -> None:
    """Makes modules inside ``module``, by their paths, round what their formats say from here on, instead of what they rounded before."""
    for path, each in formats.items():
        target = module.get_submodule(path)
        if each.cache is not None:
            _round_kept(target, each.cache)
            continue
        before = target.__dict__.pop(HOOK, None)
        if before is not None:
            before.remove()
        if each.inputs is not None:
            target.__dict__[HOOK] = target.register_forward_pre_hook(partial(_round_first, each.inputs))


def _round_first(inputs: Inputs, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return round_inputs(args[0], inputs), *args[1:]


def attention_paths(network: nn.Module) -> list[str]:
    """Paths of the modules that fetch their attention by name, as transformers lets them; those see keys and values rounded.

    Raises:
        Problem: If there are none.
    """
    found = [name for name, module in network.named_modules() if _fetches(module)]
    if not found:
        raise Problem(
            f"No keys and values of {type(network).__name__} can be rounded.",
            why="it has no attention, or none that transformers lets others take the place of.",
            fix="a format without `KV`.",
            code=Exit.INCOMPATIBLE,
        )
    return found


def _fetches(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _round_kept(attention: nn.Module, cache: Cache) -> None:
    """Makes an attention module round its keys and values."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = str(attention.config._attn_implementation)  # type: ignore[union-attr]
    if not name.startswith(PREFIX):
        AttentionInterface.register(PREFIX + name, partial(_attend, name))
        AttentionMaskInterface.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
        attention.config._attn_implementation = PREFIX + name  # type: ignore[union-attr]
    attention.__dict__[KEPT] = cache


def _attend(name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
    """The attention of this name, on rounded keys and values."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, plain)
    cache: Cache | None = module.__dict__.get(KEPT)
    if cache is not None:
        sinks = 0 if options.get("sliding_window") else cache.sinks  # once a window has moved on, the first tokens are gone
        key, value = (round_cache(each, cache, sinks=sinks) for each in (key, value))
    return attend(module, query, key, value, *args, **options)
