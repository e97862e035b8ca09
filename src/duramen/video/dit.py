"""The blocks of video transformers in two phases: first every token says its key and its value, then tokens run through the whole block a slice at a time, looking at all of them.

Everything in such a block but its self-attention is token by token, so that after the first phase a slice needs nothing of the others, and its outcome can take its place (ours, method sheet 2.4). The block's own forward is what runs, twice up to its attention; only the function that it
hands queries, keys and values to is another one meanwhile, so that the attention backend of the pipeline stays.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from torch import Tensor

from duramen.video.slices import Slices

DISPATCH = "dispatch_attention_fn"
"""What processors of diffusers hand queries, keys and values to, in the module of their model."""


class _Collected(Exception):
    """A block has said its keys and values, and need not go on."""


def wan_block(
    before: Callable[..., Tensor],
    block: Any,
    slices: Slices,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: tuple[Tensor, Tensor],
) -> Tensor:
    """A block of Wan, [B, S, d], in place.

    Args:
        before: Its own forward.
        block: The module.
        slices: How large, of tokens.
        hidden_states: Fresh tokens.
        encoder_hidden_states: What they look at beside themselves.
        temb: Of the time step, for all tokens or for each.
        rotary_emb: Cosines and sines for every token.
    """
    return _two_phases(before, block, slices, hidden_states, encoder_hidden_states, temb, rotary_emb, each=temb.ndim == 4)


def ltx_block(
    before: Callable[..., Tensor],
    block: Any,
    slices: Slices,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    """A block of LTX-Video, [B, S, d], in place.

    Args:
        before: Its own forward.
        block: The module.
        slices: How large, of tokens.
        hidden_states: Fresh tokens.
        encoder_hidden_states: What they look at beside themselves.
        temb: Of the time step, [B, 1 or S, 6d].
        image_rotary_emb: Cosines and sines for every token.
        encoder_attention_mask: Of what they look at.
    """
    more = (encoder_attention_mask,)
    return _two_phases(
        before, block, slices, hidden_states, encoder_hidden_states, temb, image_rotary_emb, *more, each=temb.shape[1] > 1
    )


def _two_phases(
    before: Callable[..., Tensor],
    block: Any,
    slices: Slices,
    x: Tensor,
    looked: Tensor,
    temb: Tensor,
    turns: tuple[Tensor, Tensor],
    *more: Any,
    each: bool,
) -> Tensor:
    """Tokens [B, S, d], changed in place: all say their keys and values, and then some after others run through the block.

    Args:
        before: The block's own forward.
        block: The module.
        slices: How large.
        x: The tokens.
        looked: What they look at beside themselves.
        temb: Of the time step.
        turns: Cosines and sines for every token.
        more: What else the forward takes, as it is.
        each: Whether every token has a time step of its own.
    """

    def run(chosen: slice) -> Tensor:
        mine = (turns[0][:, chosen], turns[1][:, chosen])
        return before(x[:, chosen], looked, temb[:, chosen] if each else temb, mine, *more)

    parts = slices.of(x.shape[1], x.nbytes)
    if len(parts) == 1:
        return run(parts[0])
    whole: list[Tensor] = []
    for chosen in parts:
        with _attention(block, partial(_collect, whole, x.shape[1], chosen)), suppress(_Collected):
            run(chosen)
    for chosen in parts:
        with _attention(block, _serving(getattr(_module(block), DISPATCH), *whole)):
            x[:, chosen] = run(chosen)
    return x


def _collect(whole: list[Tensor], tokens: int, chosen: slice, _: Tensor, *found: Tensor, **__: Any) -> Tensor:
    """Keeps keys and values of some tokens, and leaves the block."""
    if not whole:
        whole += [each.new_empty(len(each), tokens, *each.shape[2:]) for each in found]
    for each, mine in zip(whole, found, strict=True):
        each[:, chosen] = mine
    raise _Collected


def _serving(own: Callable[..., Tensor], key: Tensor, value: Tensor) -> Callable[..., Tensor]:
    """An attention that gives its first call the keys and values of all tokens, and the others their own."""
    first = iter([(key, value)])

    def attend(query: Tensor, own_key: Tensor, own_value: Tensor, **options: Any) -> Tensor:
        return own(query, *next(first, (own_key, own_value)), **options)

    return attend


def _module(block: Any) -> Any:
    return sys.modules[type(block).__module__]


@contextmanager
def _attention(block: Any, function: Callable[..., Tensor]) -> Iterator[None]:
    """Another attention for the module that a block's class is of, for a while."""
    module = _module(block)
    own = getattr(module, DISPATCH)
    setattr(module, DISPATCH, function)
    try:
        yield
    finally:
        setattr(module, DISPATCH, own)
