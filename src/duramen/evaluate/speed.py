"""Measured latency of a loaded model on this machine, and its sizes in bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

PROMPT = 256
DECODE = 24
REPEATS = 5


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files on disk."""
    return sum(file.stat().st_size for file in Path(folder).glob("model*.safetensors"))


def memory_bytes(network: torch.nn.Module) -> int:
    """Bytes of parameters and buffers in memory; tied parameters count once."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*network.parameters(), *network.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@torch.no_grad()
def latency(network: Any) -> dict[str, dict[str, float]]:
    """Seconds of one prefill (1 × 256 tokens) and tokens per second of greedy decoding (24 tokens, with cache).

    One warm-up, five repeats each; median, least and greatest.
    """
    prompt = torch.arange(PROMPT)[None] % network.config.vocab_size

    def prefill(_: None) -> None:
        network(prompt, use_cache=False)

    def fill_cache() -> Any:
        return network(prompt, use_cache=True)

    def decode(cached: Any) -> None:
        token = cached.logits[:, -1:].argmax(-1)
        for _ in range(DECODE):
            token = network(token, past_key_values=cached.past_key_values, use_cache=True).logits[:, -1:].argmax(-1)

    prefill_seconds, decode_seconds = _times(prefill, lambda: None), _times(decode, fill_cache)
    return {
        "prefill_seconds": _spread(prefill_seconds),
        "decode_tokens_per_second": _spread(DECODE / decode_seconds),
    }


def _times(function: Callable[[Any], None], prepare: Callable[[], Any]) -> np.ndarray:
    """Seconds of ``function`` on what ``prepare`` makes, without the making."""
    function(prepare())
    seconds = []
    for _ in range(REPEATS):
        prepared = prepare()
        start = time.perf_counter()
        function(prepared)
        seconds.append(time.perf_counter() - start)
    return np.array(seconds)


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"median": float(np.median(values)), "low": float(values.min()), "high": float(values.max())}
