"""Codes beside the weights of a model folder: integers and steps in ``codes.safetensors``; what every module rounds in ``formats.json``."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from duramen.families.model import BlockModel
from duramen.grids import Format
from duramen.rundir import CODES, FORMATS, BlockStore, read_codes, read_formats, write_json, write_tensors

LAYOUT = "codes [O, I], steps [O, n], zeros [O, n]; weight = steps * (codes - zeros)"


def write_codes(source: Path, store: BlockStore, num_blocks: int, folder: Path, *, shapes_stay: bool) -> None:
    """Writes the codes and formats of a finished step; earlier codes stay for layers that this one left as they were, and so does what else they round.

    Args:
        source: The folder that the step started from.
        store: Its finished blocks.
        num_blocks: How many there are.
        folder: Where to write.
        shapes_stay: Whether the step left all shapes as they were; otherwise earlier codes and formats are of no use.
    """
    blocks = range(num_blocks)
    new = {name: tensor for index in blocks for name, tensor in load_file(store.codes(index)).items()}
    without = {name for index in blocks for name in store.edited(index)} - {name.rpartition(".")[0] for name in new}
    formats = {
        name: replace(each, weights=None) if name in without else each
        for name, each in (read_formats(source) if shapes_stay else {}).items()
    }
    before = {name for name, each in formats.items() if each.weights}
    tensors = load_file(source / CODES) if before else {}
    tensors = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] in before} | new
    for index in blocks:
        formats |= store.formats(index)
    if tensors:
        write_tensors(folder / CODES, tensors, ("layout", LAYOUT))
    if any(each != Format() for each in formats.values()):
        write_json(folder / FORMATS, {name: each.text for name, each in sorted(formats.items()) if each != Format()})


def check_codes(model: BlockModel) -> dict[str, Any] | None:
    """Counts the modules that round, by format, and names the layers whose weights are not what their codes stand for; None where nothing is rounded."""
    assert model.checkpoint is not None
    formats, broken = read_formats(model.checkpoint.folder), []
    for name, quantized in read_codes(model.checkpoint.folder).items():
        stored = model.checkpoint.read(model.stored_name(f"{name}.weight"))
        if not torch.equal(quantized.weight().to(stored.dtype), stored.T if model.transposed(name) else stored):
            broken.append(name)
    return {"modules": dict(Counter(each.text for each in formats.values())), "broken": broken} if formats else None
