"""How much a training computes: operations of a token, and the share of the machine's peak that they make.

F = 6·N + 12·L·H·P·c̄ for a token, forward and backward: N the weights of matrix products, the output's counted and the embedding's not, c̄ the mean number of keys
that a query sees. c̄ depends on what is counted: ``full`` (what dense kernels do), ``causal`` (what is needed), or a causal window (what is needed there).
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from duramen.families.model import BlockModel

Convention = Literal["full", "causal"]


def mean_keys(length: int, *, convention: Convention = "full", window: int | None = None) -> float:
    """c̄: keys that a query sees, over all places of a row of T tokens.

    A causal window of W < T: the first W places see 1, 2, … W keys, all others W, in the mean W − W(W − 1)/(2T).

    Args:
        length: T.
        convention: What is counted.
        window: W; None for all.
    """
    if convention == "full":
        return float(length)
    seen = min(length, window or length)
    return seen - seen * (seen - 1) / (2 * length)


def product_weights(network: nn.Module) -> int:
    """N: weights of linear layers and of the output, whether it is tied to the embedding or not."""
    counted = {id(each.weight): each.weight.numel() for each in network.modules() if isinstance(each, nn.Linear)}
    return sum(counted.values())


def flops_per_token(network: nn.Module, length: int, convention: Convention = "full") -> float:
    """Operations for a token of a row of T, forward and backward.

    Recurrences and convolutions of state-space layers are not counted; they are a few percent.

    Args:
        network: A causal language model.
        length: T.
        convention: Of the keys that a query sees.
    """
    config: Any = network.config
    heads = getattr(config, "num_attention_heads", 0) if BlockModel.of(network).family.blocks and _attends(network) else 0
    width = int(getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0))
    keys = mean_keys(length, convention=convention, window=getattr(config, "sliding_window", None))
    return 6.0 * product_weights(network) + 12.0 * int(config.num_hidden_layers) * int(heads) * width * keys


def _attends(network: nn.Module) -> bool:
    return any("q_proj" in name or "qkv" in name or "query_key_value" in name for name, _ in network.named_modules())
