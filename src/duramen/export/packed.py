"""Codes packed into words, as other programs read them, and folders that hold them in the place of weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import save_file
from torch import Tensor

from duramen.export.hf import copy_other_files
from duramen.families.model import BlockModel
from duramen.grids import Quantized
from duramen.problem import Problem

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
    shared = quantized.codes.shape[1] // quantized.steps.shape[1]
    return next((width for width in sorted(widths, reverse=True) if shared % width == 0), None)


def check_empty(out: Path) -> None:
    """Stops where an export would be mixed with other files.

    Raises:
        Problem: If the folder has any.
    """
    if out.exists() and any(out.iterdir()):
        raise Problem(f"{out} is not empty.", why="an export is never mixed with other files.", fix="another folder.")


def write_packed(
    model: BlockModel, out: Path, packed: dict[str, Tensor], coded: Iterable[str], quantization: dict[str, Any]
) -> None:
    """Writes a model folder with packed tensors in the place of the weights of coded layers, and all else as it is.

    Args:
        model: The model, opened from a folder.
        out: Where to write.
        packed: What stands for the weights, by the names in the new folder.
        coded: The layers whose weights stay behind.
        quantization: ``quantization_config``, which says how to read it.
    """
    assert model.checkpoint is not None
    stored = {model.stored_name(f"{name}.weight") for name in coded}
    others = {name: model.checkpoint.read(name) for name in model.checkpoint.names if name not in stored}
    tensors = {name: tensor.contiguous() for name, tensor in (packed | others).items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = model.checkpoint.config | {"quantization_config": quantization}
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    copy_other_files(model.checkpoint.folder, out, but=("config.json",))
