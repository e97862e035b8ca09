"""Learning rates that carry over to other widths: the maximal update parametrisation (µP, arXiv 2203.03466, table 8, for Adam).

Against a model of width D₀, one of width k·D₀ draws its hidden weights with 1/k of the variance and learns them at 1/k of the rate, and its logits are divided by k.
The last is done by the weight of the final norm: it begins at 1/k and learns at 1/k of the rate, which is the same under Adam. So the model stays an ordinary
one that any program opens. Heads keep their width; then the scale of attention needs no change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from duramen.families.model import BlockModel


def multiplier(network: nn.Module, base_width: int) -> float:
    """k, against a model of that width; 1 without."""
    config: Any = network.config
    return float(config.hidden_size) / base_width if base_width else 1.0


@torch.no_grad()
def widen(network: nn.Module, base_width: int) -> None:
    """Draws nothing anew: scales what was drawn as for the base width to what this width needs.

    Args:
        network: As its configuration initialises it, with one deviation for all weights.
        base_width: D₀.
    """
    factor = multiplier(network, base_width)
    for name, parameter in network.named_parameters():
        kind = _kind(network, name, parameter)
        if kind == "hidden":
            parameter.div_(factor**0.5)
        elif kind == "last norm":
            parameter.div_(factor)


def groups(
    network: nn.Module, rate: float, base_width: int, only: set[str] | None = None, **adam: Any
) -> Iterator[dict[str, Any]]:
    """What AdamW is given: parameters by learning rate and decay, with their ``names``.

    Args:
        network: The model.
        rate: Learning rate at the base width.
        base_width: D₀; 0 for the same rate everywhere.
        only: Names of those that are trained; None for all.
        **adam: Of all groups; ``weight_decay`` holds for matrices.
    """
    factor, decay = multiplier(network, base_width), adam.pop("weight_decay", 0.0)
    found: dict[tuple[float, float], dict[str, Tensor]] = {}
    for name, parameter in network.named_parameters():
        if only is None or name in only:
            kind = _kind(network, name, parameter)
            mine = rate / factor if kind in ("hidden", "last norm") else rate
            found.setdefault((mine, decay if parameter.ndim > 1 else 0.0), {})[name] = parameter
    for (mine, decayed), members in found.items():
        yield {"params": list(members.values()), "names": list(members), "lr": mine, "weight_decay": decayed, **adam}


def _kind(network: nn.Module, name: str, parameter: Tensor) -> str:
    """``hidden`` (a matrix inside a block), ``last norm``, or ``other``."""
    blocks = f"{BlockModel.of(network).family.blocks}."
    if name.startswith(blocks):
        return "hidden" if parameter.ndim == 2 else "other"
    return "last norm" if parameter.ndim == 1 and name.endswith("weight") else "other"
