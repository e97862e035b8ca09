"""What the tokens of a prompt cost in every layer of a state-space model: in multiply-adds by formula, or in seconds measured on this machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from duramen.families.model import BlockModel, run_block
from duramen.hardware.clock import repeated
from duramen.ssm.mixer import find_mixers
from duramen.ssm.ssd import CHUNK
from duramen.tokens.compact import reduce
from duramen.tokens.match import match
from duramen.tokens.schedule import Costs, counted_tokens

Unit = Literal["tokens", "macs", "seconds"]
SHARES = (0.25, 0.5, 0.75, 1.0)
"""At which shares of a prompt layers are timed; between them the time goes straight."""
REPEATS = 3


def costs(unit: Unit, model: BlockModel, tokens: int, *, matches: bool, window: int | None) -> Costs:
    """What a prompt costs.

    Args:
        unit: ``tokens`` that layers see; multiply-adds (``macs``); ``seconds`` on this machine.
        model: The model.
        tokens: Length of the prompt, which is timed; the others take any length.
        matches: Whether tokens that leave look for their like.
        window: How far.
    """
    if unit == "tokens":
        return counted_tokens(len(model.blocks))
    return _multiply_adds(model, matches, window) if unit == "macs" else _seconds(model, tokens, matches, window)


def _multiply_adds(model: BlockModel, matches: bool, window: int | None) -> Costs:
    width = model.network.get_input_embeddings().weight.shape[1]  # type: ignore[operator]

    def site(tokens: float) -> float:
        """Half of the tokens against those of the other half that are near enough."""
        return float(matches * tokens / 2 * min(tokens / 2, window or tokens) * width)

    head = model.network.get_output_embeddings()  # type: ignore[operator]
    return Costs([_layer(block, model.config) for block in model.blocks], site, float(head.weight.numel()), "multiply-adds")


def _layer(block: nn.Module, config: Any) -> Callable[[float], float]:
    """Projections, convolution and scan for every token, and attention to those before it."""
    per_token, squared = 0.0, 0.0
    for name, parameter in block.named_parameters():
        if parameter.ndim == 3 and not name.endswith("conv1d.weight"):  # of experts, of which each token sees some
            per_token += parameter.numel() * config.num_experts_per_tok / len(parameter)
        elif parameter.ndim > 1 and not name.endswith("A_log"):
            per_token += parameter.numel()
        if name.endswith("q_proj.weight"):
            squared += len(parameter)
    for name in find_mixers(block):
        mixer: Any = block.get_submodule(name)
        per_token += _scan(mixer.intermediate_size, mixer.ssm_state_size, getattr(mixer, "n_groups", None))
    return lambda tokens: per_token * tokens + squared * tokens**2


def _scan(width: int, state: int, groups: int | None) -> float:
    """Multiply-adds of one step: decay, write and read of every state; by chunks as matrix products for Mamba-2."""
    return 4.5 * width * state if groups is None else CHUNK * (groups * state + width) + 2.0 * width * state


@torch.no_grad()
def _seconds(model: BlockModel, tokens: int, matches: bool, window: int | None) -> Costs:
    """Every kind of block, a site and what is outside, timed at some lengths; the least of some repeats."""
    lengths = sorted({max(2, round(share * tokens)) for share in SHARES})
    captured = {length: model.capture(torch.zeros(1, length, dtype=torch.long)) for length in lengths}
    timed: dict[str, Callable[[float], float]] = {}
    layers = []
    for index, block in enumerate(model.blocks):
        kind = repr([(name, parameter.shape) for name, parameter in block.named_parameters()])
        if kind not in timed:
            with model.opened(index) as opened:
                times = [_least(partial(run_block, opened.module, captured[n][0], captured[n][1][index])) for n in lengths]
            timed[kind] = _between(lengths, times)
        layers.append(timed[kind])
    hidden = captured[lengths[-1]][0]
    site = _between(lengths, [_least(partial(_site, hidden[0, :n], matches, window)) for n in lengths])
    outside = _least(lambda: model.capture(torch.zeros(1, tokens, dtype=torch.long))) + _least(
        lambda: model.logits(hidden[:, -1:])
    )
    return Costs(layers, site, outside, "seconds")


def _between(lengths: list[int], times: list[float]) -> Callable[[float], float]:
    return lambda tokens: float(np.interp(tokens, [0, *lengths], [0.0, *times]))


def _least(function: Callable[[], Any]) -> float:
    return float(repeated(function, REPEATS).min())


def _site(features: Tensor, matches: bool, window: int | None) -> None:
    """What a site does with these features, [T, D]: finds a fifth that leaves, and takes them out of both streams."""
    scores, count = features.float().square().sum(-1), len(features) // 5
    if matches:
        pairs = match(scores, features, count, forward=True, window=window)
        for _ in range(2):
            reduce(features, pairs)
    else:
        scores.argsort(stable=True)
