"""Learning rates that carry over to other widths: the maximal update parametrisation (µP, arXiv 2203.03466, table 8, for Adam).

Against a model of width D₀, one of width k·D₀ draws its hidden weights with 1/k of the variance and learns them at 1/k of the rate, and its logits are divided by k.
The last is done by the weight of the final norm: what it multiplies by begins at 1/k and is learned at 1/k of the rate, which is the same under Adam. So the model stays an ordinary
one that any program opens. Heads keep their width; then the scale of attention needs no change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from duramen.families.model import BlockModel
from duramen.families.norms import from_zero, last_norm


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
    factor, model = multiplier(network, base_width), BlockModel.of(network)
    last = last_norm(model)
    added = from_zero(network.get_submodule(last)) if last else 0.0
    for name, parameter in network.named_parameters():
        if _hidden(model, name, parameter):
            parameter.div_(factor**0.5)
        elif name == f"{last}.weight":
            parameter.add_(added).div_(factor).sub_(added)
        elif name == f"{last}.bias":
            parameter.div_(factor)


def shares(network: nn.Module, base_width: int) -> dict[str, float]:
    """What share of the learning rate every parameter takes, by its name; to be asked before weights are sharded, since the model runs for it.

    Args:
        network: The model.
        base_width: D₀; 0 for the whole rate everywhere.
    """
    factor, model = multiplier(network, base_width), BlockModel.of(network)
    last = last_norm(model) if base_width else None
    return {
        name: 1 / factor if _hidden(model, name, parameter) or name in (f"{last}.weight", f"{last}.bias") else 1.0
        for name, parameter in network.named_parameters()
    }


def groups(
    network: nn.Module, rate: float, taken: Mapping[str, float], only: set[str] | None = None, **adam: Any
) -> Iterator[dict[str, Any]]:
    """What AdamW is given: parameters by learning rate and decay, with their ``names``.

    Args:
        network: The model.
        rate: Learning rate at the base width.
        taken: Of ``shares``.
        only: Names of those that are trained; None for all.
        **adam: Of all groups; ``weight_decay`` holds for matrices.
    """
    decay = adam.pop("weight_decay", 0.0)
    found: dict[tuple[float, float], dict[str, Tensor]] = {}
    for name, parameter in network.named_parameters():
        if only is None or name in only:
            found.setdefault((rate * taken[name], decay if parameter.ndim > 1 else 0.0), {})[name] = parameter
    for (mine, decayed), members in found.items():
        yield {"params": list(members.values()), "names": list(members), "lr": mine, "weight_decay": decayed, **adam}


def _hidden(model: BlockModel, name: str, parameter: Tensor) -> bool:
    """Whether it is a matrix inside a block."""
    return parameter.ndim == 2 and name.startswith(f"{model.family.blocks}.")
