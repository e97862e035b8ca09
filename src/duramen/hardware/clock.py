"""How long things take on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

PROMPT = 256
"""Tokens of the prompt whose prefill is timed."""
REPEATS = 5


def now() -> float:
    """Seconds on a clock that waits for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def repeated(function: Callable[[], Any], repeats: int = REPEATS) -> np.ndarray:
    """Seconds of every repeat, after one that warms up, [repeats]."""
    function()
    seconds = []
    for _ in range(repeats):
        start = now()
        function()
        seconds.append(now() - start)
    return np.array(seconds)


def prompt(vocabulary: int) -> torch.Tensor:
    """Token ids of the prompt, [1, T]."""
    return torch.arange(PROMPT)[None] % vocabulary
