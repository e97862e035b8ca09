"""Measured latency of a loaded model on this machine, and its sizes in bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from duramen.hardware.clock import prompt, repeated

DECODE_PROMPT = 8
DECODE = 24


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files on disk."""
    return sum(file.stat().st_size for file in Path(folder).glob("model*.safetensors"))


def memory_bytes(network: torch.nn.Module) -> int:
    """Bytes of parameters and buffers in memory; tied parameters count once."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*network.parameters(), *network.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@torch.no_grad()
def latency(network: Any) -> dict[str, dict[str, float]]:
    """Seconds of one prefill (1 × 256 tokens), and tokens per second of greedy generation (24 tokens after 8, with cache).

    One warm-up, five repeats each; median, least and greatest.
    """
    tokens = prompt(network.config.vocab_size).to(network.device)
    start = tokens[:, :DECODE_PROMPT]
    options = {"attention_mask": torch.ones_like(start), "min_new_tokens": DECODE, "max_new_tokens": DECODE, "do_sample": False}
    prefill = repeated(lambda: network(tokens, use_cache=False))
    decode = repeated(lambda: network.generate(start, pad_token_id=0, **options))
    return {"prefill_seconds": _spread(prefill), "decode_tokens_per_second": _spread(DECODE / decode)}


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"median": float(np.median(values)), "low": float(values.min()), "high": float(values.max())}
