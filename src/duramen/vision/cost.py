"""What an image costs, in multiply-adds, layer by layer; as published counts have it, a scan takes 4.5 per channel and state."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from duramen.tokens.schedule import Costs
from duramen.vision.opening import side, tokens_outside
from duramen.vision.plainmamba import PlainMambaConfig
from duramen.vision.stream import VisionConfig
from duramen.vision.vim import VimConfig, VimForImageClassification
from duramen.vision.vit import transformer_layers

SCAN = 4.5
"""Multiply-adds of one step of a scan, per channel and state."""


def patch_costs(network: Any) -> Costs:
    """Of every layer by its tokens, and of all that runs whatever leaves.

    Args:
        network: A Vim, a PlainMamba, or a transformer of ``duramen.vision.vit``.
    """
    config = network.config
    costs = partial(Costs, unit="multiply-adds", stays=len(tokens_outside(network)), whole=True)
    if isinstance(config, VimConfig | PlainMambaConfig):
        of_layer = partial(_vim if isinstance(config, VimConfig) else _plainmamba, config)
        return costs([of_layer] * config.num_hidden_layers, outside=_outside(network))
    layers, _ = transformer_layers(network)
    inside = {id(each) for layer in layers for each in layer.modules()}
    rest = [each for each in network.modules() if id(each) not in inside]
    once = sum(each.weight.numel() for each in rest if isinstance(each, nn.Linear))
    patches = sum(each.weight.numel() for each in rest if isinstance(each, nn.Conv2d))
    each_layer = [partial(_transformer, _weights(layer), config.hidden_size) for layer in layers]
    return costs(each_layer, outside=once + side(network) ** 2 * patches)


def sequence_length(network: Any) -> int:
    """Tokens of an image."""
    return side(network) ** 2 + len(tokens_outside(network))


def _weights(layer: nn.Module) -> int:
    return sum(each.weight.numel() for each in layer.modules() if isinstance(each, nn.Linear))


def _transformer(weights: int, width: int, tokens: float) -> float:
    """Every weight once per token, and attention's two products."""
    return tokens * weights + 2 * tokens**2 * width


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
