"""The run directory: durable state per block, a fingerprint of everything that decides the result, and the manifest.

Every file is written under a temporary name, flushed to disk and renamed, so that at any moment a file is either absent or
whole. A block counts as finished once its record is there, which is written last and holds the hash of its tensors.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from duramen.grids import Format, Quantized, parse_format
from duramen.problem import Exit, Problem
from duramen.reading import read_json, reading
from duramen.registry import Named, Settings

STATE = ".duramen"
MASKS = "masks.safetensors"
MEASURED = (
    "log.jsonl", "results.json", "report.html", "README.md", "record.json", "metrics.jsonl", "progress.html", "manifest.json",
)  # fmt: skip
"""Names of files with times or measurements of a machine in them, which differ from run to run."""
CODES, FORMATS, EXPORTS = "codes.safetensors", "formats.json", "exports"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path``; flushes it and renames it into place when the block ends well.

    Raises:
        Problem: If the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if "No space left" in str(error):
            raise cannot_write(path, OSError(errno.ENOSPC, str(error))) from error
        raise


def _umask() -> int:
    """The permissions that new files go without; safetensors would hide its files from everyone else."""
    current = os.umask(0)
    os.umask(current)
    return current


def write_text(path: Path, text: str) -> None:
    """Writes a text file durably and at once."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON durably and at once."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], note: tuple[str, str] = ("format", "pt")) -> None:
    """Writes a safetensors file durably and at once, with one note in its header.

    More than one would come in an order that differs from run to run, and the same run must give the same bytes.
    """
    with replacing(path) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, dict([note]))


def cannot_write(path: Path, error: OSError) -> Problem:
    """What is said where a file cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return Problem(
        f"{path} cannot be written: {error.strerror or error}.",
        why="the disk is full." if full else "the folder is read-only, or belongs to someone else.",
        fix="free some space and run the same line again; finished blocks are kept." if full else "choose another OUT folder.",
        code=Exit.OUT_OF_BUDGET if full else Exit.USAGE,
    )


def hash_file(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_model(place: Path, *suffixes: str) -> dict[str, str]:
    """sha256 of a file, or of the files of a model folder that end so, by name."""
    files = [place] if place.is_file() else [file for file in sorted(place.glob("*")) if file.suffix in suffixes]
    return {file.name: hash_file(file) for file in files}


def hash_tokens(tokens: Tensor) -> str:
    """sha256 of token ids and their shape."""
    return hashlib.sha256(str(tuple(tokens.shape)).encode() + tokens.to(torch.int64).numpy().tobytes()).hexdigest()


class RunDirectory:
    """The folder OUT of one run, with its state under ``OUT/.duramen``."""

    def __init__(self, out: Path) -> None:
        self.out = Path(out)
        self.state = self.out / STATE

    @property
    def fingerprint(self) -> Path:
        """The file that says which run the folder belongs to."""
        return self.state / "fingerprint.json"

    def claim(
        self,
        fingerprint: dict[str, Any],
        steps: Sequence[tuple[str, dict[str, Any]]] = (),
        *,
        beside: Sequence[str] = (),
        until: Path | None = None,
    ) -> list[str]:
        """Takes the folder for a run, or goes on with an earlier one.

        An earlier run that did not come to its end may go on with other steps behind those that are the same: the folders of the others are set aside in its state, and nothing is lost.

        Args:
            fingerprint: All that decides the result, but for the steps.
            steps: Of every step in order, its folder under OUT, and all that decides it beside what comes before.
            beside: Names in the folder that may be there already; the first step may change if they are.
            until: The file with which the run has come so far that nothing may change any more; None for its manifest.

        Returns:
            What is other in the steps, one line each.

        Raises:
            Problem: If the folder holds something else, or a run that differs; the differences are listed.
        """
        new = fingerprint | {"steps": [{"folder": folder} | lock for folder, lock in steps]}
        if not self.fingerprint.is_file():
            self.check_free(*beside)
            write_json(self.fingerprint, new)
            return []
        old = read_json(self.fingerprint)
        before = old.pop("steps", [])
        with reading(self.fingerprint):
            folders = [self._own(each["folder"]) for each in before]
        pairs: list[tuple[Any, Any]] = list(zip_longest(before, new["steps"], fillvalue={}))
        same = next((number for number, pair in enumerate(pairs) if pair[0] != pair[1]), len(pairs))
        differences = list(_differences(old, fingerprint))
        in_steps = [line for number, pair in enumerate(pairs) for line in _differences(*pair, f"steps[{number}]")]
        ended = (until or self.out / "manifest.json").is_file()
        follows = bool(same) or any((self.out / name).is_dir() for name in beside)
        if differences or (in_steps and (ended or not follows)):
            raise Problem(
                f"{self.out} holds another run; it differs in:\n    " + "\n    ".join(differences + in_steps),
                why="continuing would mix two runs in one model.",
                fix="another OUT folder, or the settings and files of the first run.",
                code=Exit.INCOMPATIBLE,
            )
        if in_steps:
            for folder in folders[same:]:
                self._set_aside(folder)
            write_json(self.fingerprint, new)
        return in_steps

    def _set_aside(self, folder: Path) -> None:
        """Moves the state of a step, if it has any, to where nothing reads it."""
        if folder.is_dir():
            places = (self.state / "aside" / f"{folder.name}-{number}" for number in count())
            place = next(each for each in places if not each.exists())
            place.parent.mkdir(exist_ok=True)
            folder.rename(place)

    def _own(self, name: str) -> Path:
        """A folder inside OUT."""
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise ValueError(f"the folder {name} is outside")
        return self.out / name

    def check_free(self, *beside: str) -> None:
        """Stops if a folder that no run has taken holds something other than ``beside``.

        Raises:
            Problem: Then.
        """
        if self.fingerprint.is_file() or not self.out.is_dir():
            return
        if any(item.name not in (STATE, *beside) for item in self.out.iterdir()):
            raise Problem(
                f"{self.out} is not empty and holds no Duramen run.",
                why="a run writes a whole model folder and would mix it with what is there.",
                fix="another OUT folder.",
            )

    def keep_exports(self, names: Container[str]) -> None:
        """Removes from ``exports`` what a step has left that the recipe no longer has."""
        for each in (self.out / EXPORTS).glob("*"):
            if each.name not in names:
                shutil.rmtree(each) if each.is_dir() else each.unlink()

    def recorded(self, *keys: str) -> str:
        """What an earlier run measured and this one must keep to, from its fingerprint; ``auto`` if there is none."""
        found: Any = read_json(self.fingerprint) if self.fingerprint.is_file() else "auto"
        for key in keys:
            found = found.get(key, "auto") if isinstance(found, dict) else "auto"
        return str(found)

    def log(self, event: str, **fields: Any) -> None:
        """Appends one event to ``log.jsonl``."""
        import datetime

        file, now = self.out / "log.jsonl", datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"time": now, "event": event} | fields) + "\n")
        except OSError as error:
            raise cannot_write(file, error) from error

    def memo(self, step: str) -> Callable[[str, Callable[[], Any]], Any]:
        """A memo that keeps each finished part of a step as JSON."""

        def remember(key: str, compute: Callable[[], Any]) -> Any:
            file = self.state / step / f"{key}.json"
            if not file.is_file():
                write_json(file, compute())
            return json.loads(file.read_text(encoding="utf-8"))

        return remember

    def remembers(self, step: str, key: str) -> bool:
        """Whether a memo has this part already."""
        return (self.state / step / f"{key}.json").is_file()

    def write_manifest(self, **more: Any) -> dict[str, Any]:
        """Hashes every file of the result; what holds times or measurements of this machine is only named.

        Returns:
            The manifest: ``files`` (name -> sha256), ``measured`` (names), and ``more``.
        """
        there = {name: file for name, file in visible_files(self.out).items() if name != "manifest.json"}
        measured = [name for name, file in there.items() if file.name in MEASURED]
        files = {name: hash_file(file) for name, file in there.items() if name not in measured}
        manifest = {"schema": "duramen-manifest/1", "files": files, "measured": measured} | more
        write_json(self.out / "manifest.json", manifest)
        return manifest


def visible_files(folder: Path) -> dict[str, Path]:
    """The files of a folder and its folders by their paths in it, but for hidden ones."""
    found = {file.relative_to(folder): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {name.as_posix(): file for name, file in found.items() if not any(part.startswith(".") for part in name.parts)}


def _differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, pair in enumerate(zip(old, new, strict=True)):
            yield from _differences(*pair, f"{where}[{number}]")
    elif old != new:
        yield f"{where}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:77] + "..."


def hash_folder(folder: Path) -> dict[str, str]:
    """sha256 of the visible files of a folder and its folders, by their paths in it."""
    return {name: hash_file(file) for name, file in visible_files(folder).items()}


def hash_named(settings: Iterable[Settings]) -> dict[str, str]:
    """sha256 of all files that settings name, and of what decides a result in the folders."""
    found: dict[str, str] = {}
    for text in (text for each in settings for text in _named(each.model_dump())):
        place = Path(text)
        if place.is_file():
            found[text] = hash_file(place)
        elif text and place.is_dir():
            inside = {name: file for name, file in visible_files(place).items() if file.name not in MEASURED}
            found |= {f"{text}/{name}": hash_file(file) for name, file in inside.items()}
    return found


def _named(value: Any) -> Iterator[str]:
    if isinstance(value, Named):
        yield str(value)
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _named(each)


def unlike(folder: Path, hashes: dict[str, str]) -> dict[str, str]:
    """What became of files since their hashes were taken: ``is missing`` or ``was changed``, by name; without those that are as they were."""
    found = {}
    for name, digest in hashes.items():
        if not (folder / name).is_file():
            found[name] = "is missing"
        elif hash_file(folder / name) != digest:
            found[name] = "was changed"
    return found


@dataclass(frozen=True)
class Finished:
    """What is kept of a block that a step is done with.

    Attributes:
        tensors: All tensors of the block, by the model's own names.
        records: One per layer that was edited.
        pruned: What was removed, bool [O, I], by layer.
        quantized: Codes by layer.
        formats: What modules round from here on, by their names.
    """

    tensors: dict[str, Tensor]
    records: list[dict[str, Any]]
    pruned: dict[str, Tensor] = field(default_factory=dict)
    quantized: dict[str, Quantized] = field(default_factory=dict)
    formats: dict[str, Format] = field(default_factory=dict)


def read_formats(folder: Path) -> dict[str, Format]:
    """What the modules of a model folder round, by their names; empty if they round nothing.

    Raises:
        Problem: If the file is damaged.
    """
    file = folder / FORMATS
    if not file.is_file():
        return {}
    with reading(file):
        return {name: parse_format(text) for name, text in read_json(file).items()}


def read_codes(folder: Path) -> dict[str, Quantized]:
    """The codes of a folder by layer; empty without any."""
    grids = {name: each.weights for name, each in read_formats(folder).items() if each.weights}
    with reading(folder / CODES):
        tensors = load_file(folder / CODES) if grids else {}
        found = {
            name: Quantized(tensors[f"{name}.codes"], tensors[f"{name}.steps"], tensors.get(f"{name}.zeros"), grid)
            for name, grid in grids.items()
        }
        for name, each in found.items():
            if each.codes.ndim != 2 or each.steps.ndim != 2 or len(each.codes) != len(each.steps):
                raise ValueError(f"{name} has codes {tuple(each.codes.shape)} and steps {tuple(each.steps.shape)}")
        return found


class BlockStore:
    """Finished blocks of one step: tensors by stored name, bit-packed masks, codes, records."""

    def __init__(self, folder: Path, stored_name: Callable[[str], str]) -> None:
        self.folder, self.stored_name = folder, stored_name

    def _record(self, index: int) -> Path:
        return self.folder / f"block-{index:04d}.json"

    def _kept(self, index: int) -> dict[str, Any]:
        """The record of a finished block."""
        return read_json(self._record(index))

    def _files(self, index: int) -> dict[str, Path]:
        """What else is kept of it."""
        return {"shard": self.shard(index), "masks": self.masks(index), "codes": self.codes(index)}

    def shard(self, index: int) -> Path:
        """Tensors of a block."""
        return self.folder / f"block-{index:04d}.safetensors"

    def masks(self, index: int) -> Path:
        """Masks of a block."""
        return self.folder / f"block-{index:04d}.masks.safetensors"

    def codes(self, index: int) -> Path:
        """Codes of a block."""
        return self.folder / f"block-{index:04d}.codes.safetensors"

    def formats(self, index: int) -> dict[str, Format]:
        """What the modules of a finished block round."""
        return {name: parse_format(text) for name, text in self._kept(index)["formats"].items()}

    def edited(self, index: int) -> set[str]:
        """The layers of a finished block that the step edited."""
        return {record["layer"] for record in self._kept(index)["records"]}

    def names(self, index: int) -> dict[str, str]:
        """Stored name of every tensor of a finished block -> the model's own."""
        return dict(self._kept(index)["names"])

    def save(self, index: int, block: Finished) -> None:
        """Keeps a finished block; its record, written last, makes it count."""
        names = {self.stored_name(name): name for name in block.tensors}
        write_tensors(self.shard(index), {stored: block.tensors[name] for stored, name in names.items()})
        write_tensors(self.masks(index), {name: pack_mask(mask) for name, mask in block.pruned.items()})
        codes = {f"{name}.{end}": each for name, found in block.quantized.items() for end, each in found.tensors().items()}
        write_tensors(self.codes(index), codes)
        digests = {name: hash_file(file) for name, file in self._files(index).items()}
        formats = {name: each.text for name, each in block.formats.items()}
        write_json(self._record(index), {"files": digests, "names": names, "formats": formats, "records": block.records})

    def load(self, index: int) -> tuple[dict[str, Tensor], list[dict[str, Any]]] | None:
        """A finished block by the model's own names, or None if it is missing or damaged."""
        if not self._record(index).is_file():
            return None
        kept = self._kept(index)
        if any(not file.is_file() or hash_file(file) != kept["files"][name] for name, file in self._files(index).items()):
            return None
        tensors = load_file(self.shard(index))
        return {kept["names"][stored]: tensor.clone() for stored, tensor in tensors.items()}, kept["records"]


def pack_mask(pruned: Tensor) -> Tensor:
    """Bool [O, I] -> uint8 [O, ⌈I/8⌉], little-endian bits, 1 where a weight was removed."""
    return torch.from_numpy(np.packbits(pruned.cpu().numpy(), axis=1, bitorder="little"))


def unpack_mask(packed: Tensor, inputs: int) -> Tensor:
    """uint8 [O, ⌈I/8⌉] -> bool [O, I]."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, count=inputs, bitorder="little").astype(bool))
