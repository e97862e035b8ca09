"""This machine: processor, memory, the fastest type for forward passes, and how fast it multiplies."""

from __future__ import annotations

import os
import platform
import resource
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from duramen.problem import Problem

ADVANTAGE = 1.5
"""How many times faster than float32 bfloat16 must be to be chosen."""


def fastest_device() -> torch.device:
    """Where to compute: the GPU of this process (``LOCAL_RANK``, as torchrun gives it) if there is one, else the processor."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")


@cache
def gigaflops(dtype: torch.dtype) -> float:
    """Measured speed of a 768³ matrix product on the processor, best of three, in GFLOP/s."""
    matrix = torch.ones(768, 768, dtype=dtype)
    matrix @ matrix
    best = 1e30
    for _ in range(3):
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return 2 * 768**3 / best / 1e9


def forward_dtype(name: str) -> torch.dtype:
    """``auto`` is bfloat16 where this machine multiplies it clearly faster than float32; else the named type."""
    if name != "auto":
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype):
            raise Problem(
                f"`{name}` is no type of numbers.", why="forward passes run in one.", fix="float32, bfloat16 or float16."
            )
        return dtype
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    faster = _has_native_bfloat16() and gigaflops(torch.bfloat16) > ADVANTAGE * gigaflops(torch.float32)
    return torch.bfloat16 if faster else torch.float32


def rough_product(left: Tensor, right: Tensor) -> Tensor:
    """Left @ right with bfloat16 factors and a float32 sum, where this machine has instructions for it; else as they are.

    For steps that need a direction, not digits: the relative error of an entry is about 2⁻⁸. float64 is never rounded.

    Args:
        left: [O, I].
        right: [I, J].

    Returns:
        [O, J] in the dtype of ``left``.
    """
    if left.dtype != torch.float32 or not (left.is_cuda or _has_native_bfloat16()):
        return left @ right
    return (left.bfloat16() @ right.bfloat16()).float()


@cache
def _has_native_bfloat16() -> bool:
    flags = Path("/proc/cpuinfo")
    text = flags.read_text(encoding="utf-8") if flags.is_file() else ""
    return "amx_bf16" in text or "avx512_bf16" in text or "bf16" in platform.machine()


def describe() -> dict[str, str | int | float]:
    """Processor, cores, memory and capability, as printed in reports."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(total_memory() / 2**30, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def byte_unit(size: int) -> tuple[int, str]:
    """In what a number of bytes is told: its size and its name."""
    return (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")


def bytes_told(size: int) -> str:
    """A number of bytes in words."""
    unit, name = byte_unit(size)
    return f"{size / unit:.3g} {name}"


def total_memory() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU; all main memory for the processor."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else total_memory()


def peak_memory() -> int:
    """Most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def current_memory() -> int:
    """Bytes that this process holds now; the peak where the system does not say."""
    status = Path("/proc/self/statm")
    return (
        int(status.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.is_file() else peak_memory()
    )
