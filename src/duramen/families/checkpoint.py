"""A Hugging Face folder of safetensors, read tensor by tensor."""

from __future__ import annotations

import json
import os
import struct
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from duramen.families import register_own
from duramen.finite import all_finite
from duramen.problem import Exit, Problem
from duramen.reading import read_json, reading

INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The tensors of one model folder; nothing is read before it is asked for.

    From here on transformers opens the folder too, if its layers differ in shape: by our own classes, not by code beside the weights.

    Args:
        folder: A folder with ``config.json`` and ``*.safetensors``.

    Raises:
        Problem: If there are no safetensors, a shard is missing or truncated, or the model is quantized already.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.files = self._find_files()
        self._headers = {file: read_header(self.folder / file) for file in sorted(set(self.files.values()))}
        absent = [name for name, file in self.files.items() if name not in self._headers[file]]
        if absent:
            raise Problem(
                f"{absent[0]} is not in {self.files[absent[0]]}, where {INDEX} says it is.", why="a file of another model, or an index that was changed.",
                fix="fetch the folder again.", code=Exit.INCOMPATIBLE,
            )  # fmt: skip
        self._refuse_quantized()
        register_own(str(self.config.get("model_type", "?")))

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json`` as it stands."""
        return read_json(self.folder / "config.json")

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self.files)

    def read(self, name: str) -> Tensor:
        """Reads one tensor into memory of its own, in its stored type."""
        file = self.folder / self.files[name]
        with reading(file), safe_open(file, framework="pt") as shard:
            tensor: Tensor = shard.get_tensor(name)
            return tensor.clone()

    def prefetch(self, part: str) -> None:
        """Asks the system to read ahead all tensors with ``part`` in their names, into its own cache, and does not wait."""
        for name, file in self.files.items() if hasattr(os, "posix_fadvise") else ():
            if part in name:
                start, stop = self._headers[file][name]["data_offsets"]
                with (self.folder / file).open("rb") as stream:
                    os.posix_fadvise(stream.fileno(), start, stop - start, os.POSIX_FADV_WILLNEED)

    def describe(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Stored type and shape of every tensor, from the headers alone."""
        entries = {name: self._headers[file][name] for name, file in self.files.items()}
        return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}

    def _find_files(self) -> dict[str, str]:
        if not (self.folder / "config.json").is_file():
            raise Problem(
                f"{self.folder} has no config.json.",
                why="a model is a Hugging Face folder (config.json and *.safetensors) or an embedded name.",
                fix="`duramen assets` lists the embedded models.",
            )
        if (self.folder / INDEX).is_file():
            return self._indexed()
        shards = sorted(self.folder.glob("model*.safetensors"))
        if not shards:
            raise Problem(
                f"{self.folder} has no model*.safetensors.",
                why="the weights are missing, or stored as a pickle, which Duramen does not open.",
                fix="open it once in transformers and save it again with `save_pretrained`.",
            )
        return {name: file.name for file in shards for name in read_header(file)}

    def _indexed(self) -> dict[str, str]:
        """The file of every tensor, by the index; a file that is not in the folder is none of the model's."""
        with reading(self.folder / INDEX):
            found = dict(read_json(self.folder / INDEX)["weight_map"])
            away = [file for file in set(found.values()) if Path(file).name != file or not file.endswith(".safetensors")]
            if away:
                raise ValueError(f"{', '.join(away)} is no safetensors file of this folder")
        return found

    def _refuse_quantized(self) -> None:
        quantization = self.config.get("quantization_config")
        if quantization:
            raise Problem(
                f"{self.folder.name} is quantized already ({quantization.get('quant_method', 'unknown method')}).",
                why="its stored tensors are packed codes and scales, not weights that can be pruned.",
                fix="start from the unquantized checkpoint and quantize last.",
                code=Exit.INCOMPATIBLE,
            )


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file without its metadata: name -> dtype, shape, data_offsets from the start of the file.

    Raises:
        Problem: If the file is shorter than its header says.
    """
    size = file.stat().st_size if file.is_file() else 0
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length <= size - 8 else None
    except (OSError, struct.error, ValueError):
        header = None
    if header is None:
        raise _truncated(file, size, "its header is incomplete")
    with reading(file):
        header.pop("__metadata__", None)
        for entry in header.values():
            entry["data_offsets"] = [8 + length + offset for offset in entry["data_offsets"]]
            entry["shape"], entry["dtype"] = [int(size) for size in entry["shape"]], str(entry["dtype"])
        expected = max((entry["data_offsets"][1] for entry in header.values()), default=8 + length)
    if size < expected:
        raise _truncated(file, size, f"its header promises {expected:,}")
    return dict(header)


def _truncated(file: Path, size: int, detail: str) -> Problem:
    return Problem(
        f"{file.name} is damaged: it has {size:,} bytes and {detail}.",
        why="a download or a copy that was interrupted, or a full disk.",
        fix=f"fetch {file.name} again and compare its size with the source.",
    )


def check_finite(name: str, tensor: Tensor) -> None:
    """Stops on NaN or infinite weights, naming the tensor."""
    if tensor.is_floating_point() and not all_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise Problem(
            f"{name} holds {bad:,} NaN or infinite values.",
            why="training diverged, or the file was damaged or cast to a type that is too narrow.",
            fix="use another checkpoint; everything computed so far is kept.",
            code=Exit.CHECK_FAILED,
        )
