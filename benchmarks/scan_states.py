"""Claim: prompts in pieces and padding on the right leave the right states on the exact scans, and with plain transformers they do not.

    python benchmarks/scan_states.py

Runs small models with random weights by Duramen and by plain transformers: a prompt of 30 tokens in two pieces with a cache between them, against the whole prompt (largest
difference of logits, relative to the largest), and a prompt of 19 tokens with 11 of padding behind it, against the prompt alone (largest relative difference of
a layer's state). Writes benchmarks/results/scan_states.csv; seconds on one core.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, FalconMambaConfig, Mamba2Config, MambaConfig

import rows
from duramen.ssm.mixer import ExactScans

SHARED = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 256, "state_size": 16}
MODELS = {
    "mamba": MambaConfig(**SHARED),
    "falcon_mamba": FalconMambaConfig(**SHARED),
    "mamba2": Mamba2Config(**SHARED, num_heads=4, head_dim=32, n_groups=1, expand=2),
}
LENGTH, CUT = 30, 19


def in_pieces(network: nn.Module, tokens: Tensor, whole: Tensor) -> float:
    """How far the logits of a prompt in two pieces are from those of the whole."""
    first = network(tokens[:, :CUT], use_cache=True)
    second = network(tokens[:, CUT:], use_cache=True, cache=first.cache)
    return float((torch.cat([first.logits, second.logits], 1) - whole).abs().max() / whole.abs().max())


def states(network: nn.Module, tokens: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """The state of every layer after a prompt."""
    cache = network(tokens, attention_mask=mask, use_cache=True).cache
    return [cache.get_recurrent_state(layer) for layer in range(network.config.num_hidden_layers)]


@torch.no_grad()
def main() -> None:
    """Runs the table."""
    table = []
    for name, config in MODELS.items():
        torch.manual_seed(0)
        network, tokens = AutoModelForCausalLM.from_config(config).eval(), torch.randint(1, 256, (2, LENGTH))
        mask = (torch.arange(LENGTH) < CUT).long().expand(2, -1)
        whole, alone = network(tokens, use_cache=False).logits, states(network, tokens[:, :CUT])
        for subject, context in (("duramen", ExactScans(network)), ("transformers", nullcontext())):
            with context:
                padded = states(network, tokens, mask)
                figures = {
                    "logits of a prompt in pieces": in_pieces(network, tokens, whole),
                    "states after padding on the right": max(
                        float((a - b).norm() / b.norm()) for a, b in zip(padded, alone, strict=True)
                    ),
                }
            for metric, value in figures.items():
                table.append(rows.row(f"random weights, {name}", metric, "1", subject, value, samples=1))
                print(name, subject, metric, f"{value:.2g}", flush=True)
    rows.write("scan_states", table)


if __name__ == "__main__":
    main()
