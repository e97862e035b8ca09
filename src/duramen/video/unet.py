"""The blocks of video UNets, sliced and grouped: those of Stable Video Diffusion with its temporal decoder, and those of AnimateDiff.

Operators that agree on an axis run one behind another on a slice of it, and their outcome is written into one feature: spatial layers over frames, temporal ones over rows of the image, where places do not meet. Whatever is fresh is changed in place;
skips are joined to the stream frame by frame; statistics of norms over time are taken in a pass of their own (``group_norm``). It is Streamlined Inference (arXiv 2411.01171), exact where its code is not.

Each function stands in for the ``forward`` of a block of diffusers, with the arguments that its UNet names; ``looks`` are those of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from duramen.video.group_norm import Moments, affine, moments, normalised
from duramen.video.slices import Joined, Slices, piecewise

Block = Any
"""A module of diffusers."""
WIDER = 2
"""How many pieces an inner feature of a feed-forward layer may have: with what is made of it, it holds about five, and the rest of a transformer about seven."""
Layer = Callable[[int, Joined], Tensor]
"""The layer of a block with such a number, on what goes into it."""


def res_block(
    block: Block, parts: Joined, temb: Tensor | None, indicator: Tensor, slices: Slices, larger: Sequence[Block] = ()
) -> Tensor:
    """A spatio-temporal residual block: the spatial one over frames, then the temporal one over rows, in place.

    Args:
        block: A ``SpatioTemporalResBlock``.
        parts: What goes in; its memory is given back.
        temb: Embedding of the time step for every frame; None in a decoder.
        indicator: [B, T].
        slices: How large.
        larger: Samplers before it, each to four times the size.
    """
    inner = block.spatial_res_block

    def run(chosen: slice) -> Tensor:
        part = reduce(lambda x, sampler: sampler(x), larger, parts.taken(chosen))
        found: Tensor = inner(part, None if temb is None else temb[chosen])
        return found

    over = parts.owned(slices) and not larger and inner.in_channels == inner.out_channels
    x = piecewise(run, parts.frames, parts.nbytes * 4 ** len(larger), slices, out=parts.parts[0] if over else None)
    if not over:
        parts.given_back(slices)
    _temporal_res_block(block, x, temb, indicator, slices)
    return x


def _temporal_res_block(block: Block, x: Tensor, temb: Tensor | None, indicator: Tensor, slices: Slices) -> None:
    """[N, C, H, W], changed in place: once over the rows for the statistics of the second norm, and once for the outcome."""
    inner, frames = block.temporal_res_block, indicator.shape[-1]
    whole = x.view(-1, frames, *x.shape[1:])
    rows = slices.of(x.shape[-2], x.nbytes)
    if len(rows) == 1:
        before = whole.transpose(1, 2)
        after = inner(before, None if temb is None else temb.reshape(len(whole), frames, -1))
        whole.copy_(block.time_mixer(x_spatial=before, x_temporal=after, image_only_indicator=indicator).transpose(1, 2))
        return
    first = affine(_moments(whole, inner.norm1, slices), inner.norm1)
    added: Tensor | float = 0.0
    if inner.time_emb_proj is not None and temb is not None:
        added = inner.time_emb_proj(inner.nonlinearity(temb.reshape(len(whole), frames, -1)))[..., None, None].transpose(1, 2)

    def half(rows: slice) -> Tensor:
        """Up to the second norm, [B, C, T, h, W]."""
        ready = inner.nonlinearity(normalised(whole[..., rows, :], *first))
        found: Tensor = inner.conv1(ready.transpose(1, 2))
        return found + added

    found = (moments(half(each).transpose(1, 2), inner.norm2.num_groups) for each in rows)
    second = affine(reduce(Moments.merged, found), inner.norm2)
    for each in rows:
        y = inner.nonlinearity(normalised(half(each).transpose(1, 2), *second).transpose(1, 2))
        y = inner.conv2(inner.dropout(y))
        before = whole[..., each, :].transpose(1, 2)
        y += before if inner.conv_shortcut is None else inner.conv_shortcut(before)
        blended = block.time_mixer(x_spatial=before, x_temporal=y, image_only_indicator=indicator)
        whole[..., each, :] = blended.transpose(1, 2)


def _moments(whole: Tensor, norm: nn.GroupNorm, slices: Slices) -> Moments:
    """Of a whole feature, [B, T, C, H, W], row by row, so that no more than a slice is converted."""
    found = (moments(whole[..., each, :], norm.num_groups) for each in slices.of(whole.shape[-2], whole.nbytes))
    return reduce(Moments.merged, found)


def transformer(block: Block, x: Tensor, encoder: Tensor, indicator: Tensor, slices: Slices) -> None:
    """A spatio-temporal transformer, [N, C, H, W], changed in place: spatial layers over frames, temporal ones over places.

    Args:
        block: A ``TransformerSpatioTemporalModel``.
        x: A fresh feature.
        encoder: What attention looks at beside it, for every frame, [N, L, E].
        indicator: [B, T].
        slices: How large.
    """
    frames, places = indicator.shape[-1], x.shape[-2] * x.shape[-1]
    videos = len(x) // frames
    context = encoder.reshape(videos, frames, -1, encoder.shape[-1])[:, 0]
    numbers = torch.arange(frames, device=x.device).repeat(videos)
    places_in_time = block.time_pos_embed(block.time_proj(numbers).to(x.dtype))[:, None]
    target = x.view(len(x), x.shape[1], places)
    hidden = piecewise(lambda chosen: block.proj_in(block.norm(x[chosen]).flatten(2).transpose(1, 2)), len(x), x.nbytes, slices)
    last = len(block.transformer_blocks) - 1
    for number, (spatial, temporal) in enumerate(zip(block.transformer_blocks, block.temporal_transformer_blocks, strict=True)):
        for chosen in slices.of(len(hidden), hidden.nbytes):
            hidden[chosen] = spatial(hidden[chosen], encoder_hidden_states=encoder[chosen])
        for chosen in slices.of(places, hidden.nbytes):
            before = hidden[:, chosen]
            looked = context[:, None].expand(-1, before.shape[1], -1, -1).flatten(0, 1)
            after = temporal(before + places_in_time, num_frames=frames, encoder_hidden_states=looked)
            after = block.time_mixer(x_spatial=before, x_temporal=after, image_only_indicator=indicator)
            if number == last:
                target[:, :, chosen] += block.proj_out(after).transpose(1, 2)
            else:
                hidden[:, chosen] = after


def motion(block: Block, x: Tensor, frames: int, slices: Slices) -> None:
    """A motion module of AnimateDiff, [N, C, H, W], changed in place: attention over time, row by row of the image.

    Args:
        block: An ``AnimateDiffTransformer3D``.
        x: A fresh feature.
        frames: T.
        slices: How large.
    """
    whole = x.view(-1, frames, *x.shape[1:])
    scale, shift = affine(_moments(whole, block.norm, slices), block.norm)
    for rows in slices.of(x.shape[-2], x.nbytes):
        part = whole[..., rows, :]
        hidden = block.proj_in(normalised(part, scale, shift).permute(0, 3, 4, 1, 2).flatten(0, 2))
        for each in block.transformer_blocks:
            hidden = each(hidden_states=hidden)
        hidden = block.proj_out(hidden)
        part += hidden.view(len(whole), *part.shape[-2:], frames, -1).permute(0, 3, 4, 1, 2)


def sampled(block: Block, x: Tensor, slices: Slices, *, up: bool, size: Any = None) -> Tensor:
    """Up- or down-sampling over frames.

    Args:
        block: The sampler.
        x: What goes in.
        slices: How large.
        up: Whether it becomes four times as large; nobody reads ``x`` any more then.
        size: Of the outcome, for up-sampling.
    """
    more = () if size is None else (size,)
    found = piecewise(lambda chosen: block(x[chosen], *more), len(x), x.nbytes * (4 if up else 1), slices)
    Joined((x,), last=up).given_back(slices)
    return found


def spatial(resnet: Block, attention: Block | None, parts: Joined, temb: Tensor, slices: Slices, **looks: Any) -> Tensor:
    """A residual block of images and the transformer behind it, over frames.

    Args:
        resnet: A ``ResnetBlock2D``.
        attention: A ``Transformer2DModel``, or None.
        parts: What goes in; its memory is given back.
        temb: Embedding of the time step for every frame.
        slices: How large.
        looks: What attention is given beside it, for every frame or once.
    """
    frames = parts.frames

    def run(chosen: slice) -> Tensor:
        x: Tensor = resnet(input_tensor=parts.taken(chosen), temb=_of(temb, chosen, frames))
        if attention is None:
            return x
        mine = {name: _of(value, chosen, frames) for name, value in looks.items()}
        found: Tensor = attention(hidden_states=x, return_dict=False, **mine)[0]
        return found

    x = piecewise(run, frames, parts.nbytes, slices)
    parts.given_back(slices)
    return x


def _of(value: Any, chosen: slice, frames: int) -> Any:
    """What there is for every frame, of some; anything else as it is."""
    return value[chosen] if isinstance(value, Tensor) and len(value) == frames else value


def down(block: Block, slices: Slices, x: Tensor, layer: Layer) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A down block: what every layer gives is a skip, and so is what is sampled; nothing is given back."""
    skips: tuple[Tensor, ...] = ()
    for number in range(len(block.resnets)):
        x = layer(number, Joined((x,), last=False))
        skips += (x,)
    for each in block.downsamplers or ():
        x = sampled(each, x, slices, up=False)
        skips += (x,)
    return x, skips


def middle(block: Block, x: Tensor, layer: Layer) -> Tensor:
    """The block in the middle: all of it, where the published code runs its second residual block alone."""
    for number in range(len(block.resnets)):
        x = layer(number, Joined((x,), last=number > 0))
    return x


def up(block: Block, slices: Slices, x: Tensor, skips: tuple[Tensor, ...], layer: Layer, size: Any) -> Tensor:
    """An up block; skips and what came in are given back once they were read."""
    for number, skip in zip(range(len(block.resnets)), reversed(skips), strict=False):
        x = layer(number, Joined((x, skip)))
    for each in block.upsamplers or ():
        x = sampled(each, x, slices, up=True, size=size)
    return x


def svd_layer(
    block: Block, slices: Slices, number: int, parts: Joined, *, temb: Tensor, image_only_indicator: Tensor, **looks: Any
) -> Tensor:
    """A residual block of Stable Video Diffusion, and the transformer behind it if there is one."""
    x = res_block(block.resnets[number], parts, temb, image_only_indicator, slices)
    attention = _attention(block, number)
    if attention is not None:
        transformer(attention, x, looks["encoder_hidden_states"], image_only_indicator, slices)
    return x


def svd_down(block: Block, slices: Slices, hidden_states: Tensor, **told: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A down block of Stable Video Diffusion, with attention or without."""
    return down(block, slices, hidden_states, partial(svd_layer, block, slices, **told))


def svd_mid(block: Block, slices: Slices, hidden_states: Tensor, **told: Any) -> Tensor:
    """The block in the middle."""
    return middle(block, hidden_states, partial(svd_layer, block, slices, **told))


def svd_up(
    block: Block,
    slices: Slices,
    hidden_states: Tensor,
    *,
    res_hidden_states_tuple: tuple[Tensor, ...],
    upsample_size: Any = None,
    **told: Any,
) -> Tensor:
    """An up block, with attention or without."""
    return up(block, slices, hidden_states, res_hidden_states_tuple, partial(svd_layer, block, slices, **told), upsample_size)


def temporal_decoder(
    decoder: Block, slices: Slices, sample: Tensor, image_only_indicator: Tensor, num_frames: int = 1
) -> Tensor:
    """The temporal decoder of Stable Video Diffusion, all of it, so that what follows a sampler, and what ends it, run in the same slice.

    Args:
        decoder: A ``TemporalDecoder``.
        slices: How large.
        sample: Latents of all frames, [N, c, H, W].
        image_only_indicator: [B, T].
        num_frames: T.
    """

    def blended(resnet: Block, x: Tensor, larger: Sequence[Block] = ()) -> Tensor:
        return res_block(resnet, Joined((x,)), None, image_only_indicator, slices, larger)

    middle = decoder.mid_block
    x = blended(middle.resnets[0], decoder.conv_in(sample))
    for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=False):
        in_place(attention, x, slices)
        x = blended(resnet, x)
    x, larger = x.to(next(decoder.up_blocks.parameters()).dtype), ()
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x, larger = blended(resnet, x, larger), ()
        larger = tuple(block.upsamplers or ())
    frames = piecewise(
        lambda chosen: decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(x[chosen]))), len(x), x.nbytes, slices
    )
    Joined((x,)).given_back(slices)
    video = decoder.time_conv_out(frames.view(-1, num_frames, *frames.shape[1:]).transpose(1, 2))
    found: Tensor = video.transpose(1, 2).flatten(0, 1)
    return found


def in_place(function: Callable[[Tensor], Tensor], x: Tensor, slices: Slices) -> Tensor:
    """Changes a fresh feature over frames by what keeps its shape."""
    return piecewise(lambda chosen: function(x[chosen]), len(x), x.nbytes, slices, out=x)


def feed_forward(before: Callable[[Tensor], Tensor], block: Block, slices: Slices, x: Tensor) -> Tensor:
    """A feed-forward layer, whose inner feature is several times as large as what goes in: over tokens, whatever they stand for.

    Args:
        before: Its own forward.
        block: A ``FeedForward``.
        slices: How large, of the inner feature.
        x: Tokens along the last axis but one.
    """
    tokens = x.reshape(-1, x.shape[-1])
    inner = tokens.nbytes * block.net[0].proj.out_features // x.shape[-1] // WIDER
    return piecewise(lambda chosen: before(tokens[chosen]), len(tokens), inner, slices).view(*x.shape[:-1], -1)


def motion_layer(
    block: Block, slices: Slices, number: int, parts: Joined, *, temb: Tensor, num_frames: int = 1, **looks: Any
) -> Tensor:
    """A residual block of AnimateDiff, the transformer behind it if there is one, and the motion module if there is one."""
    x = spatial(block.resnets[number], _attention(block, number), parts, temb, slices, **looks)
    if number < len(block.motion_modules):
        motion(block.motion_modules[number], x, num_frames, slices)
    return x


def motion_down(
    block: Block, slices: Slices, hidden_states: Tensor, *, additional_residuals: Tensor | None = None, **told: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A down block of AnimateDiff, with attention or without."""

    def layer(number: int, parts: Joined) -> Tensor:
        x = motion_layer(block, slices, number, parts, **told)
        if additional_residuals is not None and number == len(block.resnets) - 1:
            x += additional_residuals
        return x

    return down(block, slices, hidden_states, layer)


def motion_mid(block: Block, slices: Slices, hidden_states: Tensor, temb: Tensor, **told: Any) -> Tensor:
    """The block in the middle."""
    return middle(block, hidden_states, partial(motion_layer, block, slices, temb=temb, **told))


def motion_up(
    block: Block,
    slices: Slices,
    hidden_states: Tensor,
    *,
    res_hidden_states_tuple: tuple[Tensor, ...],
    upsample_size: Any = None,
    **told: Any,
) -> Tensor:
    """An up block, with attention or without."""
    return up(
        block, slices, hidden_states, res_hidden_states_tuple, partial(motion_layer, block, slices, **told), upsample_size
    )


def _attention(block: Block, number: int) -> Block | None:
    """Behind a residual block; in the middle the last has none."""
    found = getattr(block, "attentions", ())
    return found[number] if number < len(found) else None
