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

from torch import Tensor, nn

from duramen.video.slices import Slices

DISPATCH, FUNCTIONAL = "dispatch_attention_fn", "F"
"""What processors of diffusers hand queries, keys and values to, in the module of their model; and where older ones take it from that hand them to torch."""


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


def cogvideox_block(
    before: Callable[..., tuple[Tensor, Tensor]],
    block: Any,
    slices: Slices,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """A block of CogVideoX, tokens [B, S, d] in place and text [B, T, d]; each sees the other, the text first.

    Args:
        before: Its own forward.
        block: The module.
        slices: How large, of tokens.
        hidden_states: Fresh tokens.
        encoder_hidden_states: The text, which the block changes too.
        temb: Of the time step, [B, c].
        image_rotary_emb: Cosines and sines for every token, [S, h].
        attention_kwargs: What else attention takes, as it is.
    """

    def run(chosen: slice) -> tuple[Tensor, Tensor]:
        mine = image_rotary_emb and (image_rotary_emb[0][chosen], image_rotary_emb[1][chosen])
        return before(hidden_states[:, chosen], encoder_hidden_states, temb, mine, attention_kwargs)

    return _beside_text(run, block.attn1.processor, slices, hidden_states, encoder_hidden_states.shape[1], text_first=True)


def hunyuan_block(
    before: Callable[..., tuple[Tensor, Tensor]],
    block: Any,
    slices: Slices,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None,
    turns: tuple[Tensor, Tensor],
    first_temb: Tensor | None = None,
    of_first: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A block of HunyuanVideo, with weights of their own for text or with the same, tokens [B, S, d] in place and text [B, T, d]; each sees the other, the text last.

    Args:
        before: Its own forward.
        block: The module.
        slices: How large, of tokens.
        hidden_states: Fresh tokens.
        encoder_hidden_states: The text, which the block changes too.
        temb: Of the time step, [B, c].
        attention_mask: Of all keys, [B, 1, 1, S + T].
        turns: Cosines and sines for every token, [S, h].
        first_temb: The same of the first frame, where that is given.
        of_first: Tokens of the first frame.
    """

    def run(chosen: slice) -> tuple[Tensor, Tensor]:
        mine = (turns[0][chosen], turns[1][chosen])
        first = None if of_first is None else max(0, min(of_first, chosen.stop) - chosen.start)
        return before(hidden_states[:, chosen], encoder_hidden_states, temb, attention_mask, mine, first_temb, first)

    return _beside_text(run, block.attn.processor, slices, hidden_states, encoder_hidden_states.shape[1], text_first=False)


def _beside_text(
    run: Callable[[slice], tuple[Tensor, Tensor]], processor: Any, slices: Slices, x: Tensor, text: int, *, text_first: bool
) -> tuple[Tensor, Tensor]:
    """Tokens that run beside a text, changed in place, and what becomes of the text; it runs beside every slice, and all give it the same.

    Args:
        run: Some of the tokens and the whole text through the block.
        processor: What hands queries, keys and values on.
        slices: How large.
        x: The tokens, [B, S, d].
        text: Tokens of the text, T.
        text_first: Whether its keys come first.
    """
    tokens, ahead, said = x.shape[1], text if text_first else 0, x.new_empty(0)

    def places(chosen: slice) -> list[tuple[slice, slice]]:
        count = chosen.stop - chosen.start
        of_text, there = (0, 0) if text_first else (count, tokens)
        return [
            (slice(ahead + chosen.start, ahead + chosen.stop), slice(ahead, ahead + count)),
            (slice(there, there + text), slice(of_text, of_text + text)),
        ]

    parts = slices.of(tokens, x.nbytes)
    if len(parts) == 1:
        return run(parts[0])
    for chosen in _phases(run, processor, parts, tokens + text, places):
        x[:, chosen], said = run(chosen)
    return x, said


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
    """Tokens [B, S, d], changed in place, that look at a text which stays.

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
    for chosen in _phases(run, block, parts, x.shape[1], lambda chosen: [(chosen, slice(None))]):
        x[:, chosen] = run(chosen)
    return x


def _phases(
    run: Callable[[slice], Any],
    place: Any,
    parts: list[slice],
    tokens: int,
    places: Callable[[slice], list[tuple[slice, slice]]],
) -> Iterator[slice]:
    """All slices say their keys and values; then each comes, to be run while its attention sees those of all.

    Args:
        run: A slice through the block.
        place: Of whose module the attention is.
        parts: The slices.
        tokens: Keys of all together.
        places: Of a slice, where which of its keys belong.
    """
    whole: list[Tensor] = []

    def serve(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return _serving(own, *whole)

    for chosen in parts:
        collect = partial(_collect, whole, tokens, places(chosen))
        with _attention(place, lambda own, collect=collect: collect), suppress(_Collected):  # type: ignore[misc]
            run(chosen)
    for chosen in parts:
        with _attention(place, serve):
            yield chosen


def _collect(
    whole: list[Tensor], tokens: int, places: list[tuple[slice, slice]], _: Tensor, *found: Tensor, **__: Any
) -> Tensor:
    """Keeps keys and values of some tokens, and leaves the block."""
    if not whole:
        whole += [each.new_empty(len(each), tokens, *each.shape[2:]) for each in found]
    for each, mine in zip(whole, found, strict=True):
        for there, here in places:
            each[:, there] = mine[:, here]
    raise _Collected


def _serving(own: Callable[..., Tensor], key: Tensor, value: Tensor) -> Callable[..., Tensor]:
    """An attention that gives its first call the keys and values of all tokens, and the others their own."""
    first = iter([(key, value)])

    def attend(query: Tensor, own_key: Tensor, own_value: Tensor, **options: Any) -> Tensor:
        return own(query, *next(first, (own_key, own_value)), **options)

    return attend


class _Functional:
    """``torch.nn.functional`` with another attention, of [B, S, heads, h]."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        self.scaled_dot_product_attention = partial(_turned, attend)

    def __getattr__(self, name: str) -> Any:
        return getattr(nn.functional, name)


def _turned(attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """An attention between heads and tokens the other way round."""
    return attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), **options).transpose(1, 2)


@contextmanager
def _attention(place: Any, another: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> Iterator[None]:
    """Another attention for the module that something's class is of, for a while: a function of its own one, of [B, S, heads, h]."""
    module: Any = sys.modules[type(place).__module__]
    name = DISPATCH if hasattr(module, DISPATCH) else FUNCTIONAL
    own = getattr(module, name)
    if name == DISPATCH:
        setattr(module, name, another(own))
    else:
        setattr(module, name, _Functional(another(partial(_turned, own.scaled_dot_product_attention))))
    try:
        yield
    finally:
        setattr(module, name, own)
