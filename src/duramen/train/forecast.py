"""What a pretraining will take, before it begins: parameters, operations, and the memory of every process, from a model without weights."""

from __future__ import annotations

from typing import Any

import torch

from duramen.train.folder import blocks_of, configuration
from duramen.train.pretrain import Settings
from duramen.train.throughput import flops_per_token

RANKS = (1, 8, 64, 256)


def forecast_pretraining(settings: Settings, vocabulary: int) -> dict[str, Any]:
    """Figures of one stage.

    Weights, gradients and AdamW's two moments are in float32 and sharded: 16 bytes a parameter, divided by the processes. Beside them a process holds two blocks whole (the one that runs
    and the one that is fetched), the logits of its rows three times (as they are, in float32, and their gradient), and the activations that the backward pass needs: of every block its
    input where blocks are recomputed, and about 34 bytes a token and channel where not (arXiv 2205.05198, without its attention matrices, which fused kernels do not keep). All but the
    first are a model, not a measurement.

    Args:
        settings: With ``model``.
        vocabulary: Tokens of the tokenizer.

    Returns:
        ``parameters``, ``flops_per_token``, ``tokens``, ``flops``, and by number of processes the bytes of each.
    """
    from transformers import AutoModelForCausalLM

    config = configuration(settings.model, vocabulary)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    parameters = sum(each.numel() for each in network.parameters())
    tokens = settings.steps * settings.batch * settings.context
    flops = flops_per_token(network, settings.context, "causal")
    return {
        "parameters": parameters, "flops_per_token": flops, "tokens": tokens, "flops": flops * tokens,
        "bytes": {str(ranks): rank_bytes(network, settings, ranks) for ranks in RANKS},
    }  # fmt: skip


def rank_bytes(network: Any, settings: Settings, ranks: int) -> dict[str, int]:
    """Bytes of one of so many processes: of its share, of whole blocks, of logits, of activations, and in all."""
    config, half = network.config, 2 if settings.dtype != "float32" else 4
    parameters = sum(each.numel() for each in network.parameters())
    blocks = [sum(each.numel() for each in block.parameters()) for block in blocks_of(network)]
    rows = min(settings.at_once, max(1, settings.batch // ranks)) * settings.context
    kept = half if settings.recompute else 34
    found = {
        "share": 16 * parameters // ranks,
        "whole_blocks": 0 if ranks == 1 else 2 * half * max(blocks),
        "logits": rows * config.vocab_size * (half + 4 + 4),
        "activations": rows * config.hidden_size * (kept * len(blocks) + (34 if settings.recompute else 0)),
    }
    return found | {"total": sum(found.values())}
