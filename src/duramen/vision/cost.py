"""What an image costs a state-space model, in multiply-adds, layer by layer; as the published counts have it (method sheet, 2.5), a scan takes 4.5 per channel and state."""

from __future__ import annotations

from functools import partial
from typing import Any

from duramen.tokens.schedule import Costs
from duramen.vision.plainmamba import PlainMambaConfig, PlainMambaForImageClassification
from duramen.vision.stream import VisionConfig
from duramen.vision.vim import VimConfig, VimForImageClassification

SCAN = 4.5
"""Multiply-adds of one step of a scan, per channel and state."""


def patch_costs(model: VimForImageClassification | PlainMambaForImageClassification) -> Costs:
    """Of every layer by its tokens, and of all that runs whatever leaves.

    Args:
        model: Its config says what counts.
    """
    config = model.config
    layers = [partial(_vim if isinstance(config, VimConfig) else _plainmamba, config)] * config.num_hidden_layers
    return Costs(layers, outside=_outside(model), unit="multiply-adds")


def sequence_length(config: VisionConfig) -> int:
    """Tokens of an image."""
    return config.side**2 + isinstance(config, VimConfig)


def _inner(config: VisionConfig) -> tuple[int, int, int]:
    """E, R and N."""
    return 2 * config.hidden_size, -(-config.hidden_size // 16), config.state_size


def _vim(config: VimConfig, tokens: float) -> float:
    inner, rank, states = _inner(config)
    direction = inner * (config.kernel_size + rank + 2 * states + rank + SCAN * states)
    return tokens * (3 * config.hidden_size * inner + 2 * direction)


def _plainmamba(config: PlainMambaConfig, tokens: float) -> float:
    """The convolution runs on the whole grid; with the official pairing so do the projections of Δ, B and C."""
    inner, rank, states = _inner(config)
    grid = config.side**2
    told = inner * (2 * rank + 2 * states) * (grid if config.official_pairing else tokens)
    return tokens * (3 * config.hidden_size * inner + 4 * inner * SCAN * states) + told + grid * inner * config.kernel_size**2


def _outside(model: Any) -> float:
    """Patches, head, and the convolutions before the patches."""
    config: Any = model.config
    head, cells = model.head.weight.numel(), config.side**2
    if isinstance(model, VimForImageClassification):
        return float(head + cells * model.patch_embed.proj.weight.numel())
    stem = model.patch_embed
    found = head + cells * stem.projection.weight.numel()
    if hasattr(stem, "stem"):
        weights = [
            part.weight.numel() for part in (*stem.stem, *stem.convs) if hasattr(part, "weight") and part.weight.ndim == 4
        ]
        found += (config.image_size // 2) ** 2 * sum(weights)
    first = model.layers[0].dw
    return float(found + (0 if first is None else cells * first[0].weight.numel()))
