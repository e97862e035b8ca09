"""Codes beside the weights of a model folder: integers and steps in ``codes.safetensors``, the grid of every layer in ``grids.json``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from duramen.families.model import BlockModel
from duramen.grids import Quantized, parse_grid
from duramen.rundir import CODES, GRIDS, BlockStore, write_json, write_tensors

LAYOUT = "codes [O, I], steps [O, n], zeros [O, n]; weight = steps * (codes - zeros)"


def write_codes(source: Path, store: BlockStore, num_blocks: int, folder: Path, *, shapes_stay: bool) -> None:
    """Writes the codes of a finished step; those of earlier steps stay for layers that this one left as they were.

    Args:
        source: The folder that the step started from.
        store: Its finished blocks.
        num_blocks: How many there are.
        folder: Where to write.
        shapes_stay: Whether the step left all shapes as they were; otherwise earlier codes are of no use.
    """
    blocks = range(num_blocks)
    edited = {name for index in blocks for name in store.edited(index)}
    grids = {name: grid for name, grid in _grids(source).items() if shapes_stay and name not in edited}
    tensors = load_file(source / CODES) if grids else {}
    tensors = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] in grids}
    for index in blocks:
        tensors |= load_file(store.codes(index))
        grids |= store.grids(index)
    if grids:
        write_tensors(folder / CODES, tensors, ("layout", LAYOUT))
        write_json(folder / GRIDS, dict(sorted(grids.items())))


def read_codes(folder: Path) -> dict[str, Quantized]:
    """The codes of a folder by layer; empty without any."""
    grids = _grids(folder)
    tensors = load_file(folder / CODES) if grids else {}
    return {
        name: Quantized(tensors[f"{name}.codes"], tensors[f"{name}.steps"], tensors.get(f"{name}.zeros"), parse_grid(text))
        for name, text in grids.items()
    }


def check_codes(model: BlockModel) -> dict[str, Any] | None:
    """Counts the layers that are on a grid, by grid, and names those whose weights are not what their codes stand for; None without codes."""
    assert model.checkpoint is not None
    found, broken = read_codes(model.checkpoint.folder), []
    for name, quantized in found.items():
        stored = model.checkpoint.read(model.stored_name(f"{name}.weight"))
        if not torch.equal(quantized.weight().to(stored.dtype), stored.T if model.transposed(name) else stored):
            broken.append(name)
    return {"layers": dict(Counter(each.grid.text for each in found.values())), "broken": broken} if found else None


def _grids(folder: Path) -> dict[str, str]:
    file = folder / GRIDS
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
