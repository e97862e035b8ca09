"""The nested checkpoint: one file from which every point of a search's front opens.

It holds the dense model once, and of the readers the levels that the front needs: the columns of the units that stay, [O, k] each. A
sub-network is the dense model with these readers, without the units that are gone. Nothing is fitted on opening: the levels are those that the
search compared, while ``subnet`` from ``search.json`` repairs every point anew on what its own blocks put out.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from duramen.families import register_own
from duramen.families.model import BlockModel
from duramen.problem import Problem
from duramen.rundir import replacing
from duramen.search.database import Database, Module, level_file, numbers_in, plan_of, read_level, restore
from duramen.shrink.surgery import shrunk

NESTED = "nested.safetensors"
FORMAT = "duramen-nested/1"
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
LEVEL = "nested."
"""How the names of levels begin: ``nested.BLOCK.KIND.LEVEL.weight``."""


def write_nested(file: Path, database: Database, report: Mapping[str, Any]) -> None:
    """Writes the file, one block in memory at a time.

    Args:
        file: Where to write.
        database: Levels of all modules.
        report: What ``search.json`` says.
    """
    config = database.model.config.to_dict()
    header = {"format": FORMAT, "config": config} | {key: report[key] for key in ("base", "modules", "front")}
    entries = [(name, tensor.to("meta")) for name, tensor in _tensors(database, report["front"])]
    with replacing(file) as partial, partial.open("wb") as stream:
        stream.write(_preamble(entries, json.dumps(header)))
        for _, tensor in _tensors(database, report["front"]):
            stream.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _preamble(entries: Sequence[tuple[str, Tensor]], note: str) -> bytes:
    """The start of a safetensors file: length and JSON of a note, names, types, shapes and places."""
    found: dict[str, Any] = {"__metadata__": {"duramen": note}}
    offset = 0
    for name, tensor in entries:
        end = offset + tensor.numel() * tensor.element_size()
        found[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(found).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _tensors(database: Database, front: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """The dense model's tensors as stored, and the levels of the front."""
    model = database.model
    yield from model.stored_outside()
    for index in range(len(model.blocks)):
        with model.opened(index) as block:
            yield from block.tensors.items()
        numbers = {database.modules[number].units.kind: number for number in numbers_in(database.modules, index)}
        with safe_open(level_file(database.folder, index), "pt") as levels:
            for key in sorted(levels.keys()):
                kind, level, _ = key.split(".")
                if any(point["levels"][numbers[kind]] == int(level) for point in front):
                    yield f"{LEVEL}{index}.{key}", levels.get_tensor(key)


def read_header(file: Path) -> dict[str, Any]:
    """What a nested checkpoint says of itself; empty if the file is none."""
    try:
        with safe_open(file, "pt") as stored:
            header: dict[str, Any] = json.loads((stored.metadata() or {}).get("duramen", "{}"))
    except (OSError, ValueError, SafetensorError):
        return {}
    return header if isinstance(header, dict) and header.get("format") == FORMAT else {}


def reader(file: Path, module: Module, level: int) -> tuple[Tensor, Tensor | None]:
    """The reader of a module at a level that is neither off nor full; see ``database.read_level``."""
    return read_level(file, f"{LEVEL}{module.units.block}.", module, level)


@torch.no_grad()
def open_nested(file: str | Path, point: int) -> nn.Module:
    """One point of the front as a transformers model, in the stored type.

    Args:
        file: A nested checkpoint.
        point: Which point, from 0.

    Raises:
        Problem: If the file is none, or has no such point.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    file = Path(file)
    header = read_header(file)
    levels = levels_of(header, point, file)
    with safe_open(file, "pt") as stored:
        dense = {name: stored.get_tensor(name) for name in sorted(stored.keys()) if not name.startswith(LEVEL)}
    register_own(header["config"]["model_type"])
    kind = next(iter(dense.values())).dtype
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**header["config"]), dtype=kind).eval()
    network.load_state_dict(dense, strict=False)
    network.tie_weights()
    model = BlockModel.from_module(network)
    modules = restore(model, header["modules"])
    for module, level in zip(modules, levels, strict=True):
        if module.grid[level] and level != module.full:
            weight, bias = reader(file, module, level)
            layer = network.get_submodule(module.units.reader)
            layer.weight.copy_(weight.T if model.transposed(module.units.reader) else weight)
            if bias is not None:
                layer.bias.copy_(bias)
    return shrunk(model, plan_of(model, modules, levels, {"method": "nested", "point": point}))


def levels_of(header: Mapping[str, Any], point: int, file: Path) -> tuple[int, ...]:
    """The levels of one point of the front that a finished search has written.

    Raises:
        Problem: If there is no such search, or no such point.
    """
    if not header:
        raise Problem(
            f"{file} is no finished search.",
            why="there is no such file, or its format is another one.",
            fix=f"`OUT/search.json` of a run with a step `search`, or `OUT/{NESTED}` if it had `nested: true`.",
        )
    front = header["front"]
    if not 0 <= point < len(front):
        raise Problem(
            f"The front has {len(front)} points, and point {point} is wanted.",
            why="they are counted from 0.",
            fix=f"`point: {len(front) - 1}` or less.",
        )
    return tuple(front[point]["levels"])
