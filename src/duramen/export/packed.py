"""Codes packed into words, as other programs read them."""

from __future__ import annotations

from math import gcd

import torch
from jaxtyping import Int
from torch import Tensor

from duramen.grids import Quantized

WORD = 32
"""Bits of a word."""


def pack_words(codes: Int[Tensor, "R C"], bits: int) -> Int[Tensor, "R W"]:
    """Codes from 0 to 2^bits − 1 along the last axis into words of 32 bits, the first in the lowest; the last word is filled with zeros."""
    per = WORD // bits
    padded = torch.nn.functional.pad(codes.to(torch.int64), (0, -codes.shape[1] % per))
    words = (padded.view(len(codes), -1, per) << (bits * torch.arange(per, device=codes.device))).sum(-1)
    return torch.where(words >= 2 ** (WORD - 1), words - 2**WORD, words).to(torch.int32)


def pack_bytes(codes: Int[Tensor, "R C"], bits: int) -> Int[Tensor, "R B"]:
    """The same into bytes."""
    per = 8 // bits
    padded = torch.nn.functional.pad(codes.to(torch.int32), (0, -codes.shape[1] % per))
    return (padded.view(len(codes), -1, per) << (bits * torch.arange(per, device=codes.device))).sum(-1).to(torch.uint8)


def container(quantized: Quantized) -> int:
    """Bits of the smallest of the widths that programs execute which holds the codes: 4 or 8."""
    return 4 if quantized.grid.bits <= 4 else 8


def unsigned(quantized: Quantized, bits: int) -> tuple[Int[Tensor, "O I"], Int[Tensor, "O n"]]:
    """Codes and codes of zero counted from the lowest of so many bits."""
    if quantized.zeros is not None:
        return quantized.codes.int(), quantized.zeros.int()
    middle = 2 ** (bits - 1)
    return quantized.codes.int() + middle, torch.full(quantized.steps.shape, middle, dtype=torch.int32)


def common_group(quantized: Quantized, widths: tuple[int, ...]) -> int | None:
    """The widest group among ``widths`` that divides what shares a step; None if none does."""
    shared = gcd(quantized.codes.shape[1] // quantized.steps.shape[1], quantized.codes.shape[1])
    return next((width for width in sorted(widths, reverse=True) if shared % width == 0), None)
