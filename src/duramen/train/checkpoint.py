"""Checkpoints of training: written beside the steps that follow, whole or not there, and open to any number of processes.

A checkpoint is a folder of safetensors files (of torch's distributed checkpoints, so that shards of two processes open in one or three), ``facts.json``
for what is no tensor, and ``manifest.json`` with the hash of every file. It is written under a temporary name and renamed once all of it is on the
disk. On the way back the newest one whose hashes are right is taken; a damaged one is left for the one before it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from duramen.calibrate import ranks
from duramen.problem import Exit, Problem
from duramen.rundir import cannot_write, hash_folder, unlike, write_json

FOLDER, FACTS, MANIFEST = "checkpoints", "facts.json", "manifest.json"


class Checkpoints:
    """The checkpoints of one training, in a folder of their own; None for nowhere.

    Args:
        folder: Of the training.
        keep: How many of the last ones stay.
        milestones: Steps between those that stay for good; 0 for none.
        tell: Called with what has to be said.
    """

    def __init__(
        self, folder: Path | None, *, keep: int = 1, milestones: int = 0, tell: Callable[[str], None] = warnings.warn
    ) -> None:
        self.folder = None if folder is None else folder / FOLDER
        self.keep, self.milestones, self.tell = keep, milestones, tell
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._group: Any = None

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Takes copies of the tensors and writes them while training goes on; waits for the one before.

        Args:
            step: Steps done.
            tensors: By name; shards of the processes are put together.
            facts: What is no tensor, as JSON.

        Raises:
            Problem: If the one before could not be written; the older ones are still there.
        """
        if self.folder is None:
            return
        self.wait()
        if self._group is None and ranks.count() > 1:
            self._group = distributed.new_group(backend="gloo")
        copies = {name: _copied(tensor) for name, tensor in tensors.items()}
        self._writing = self._thread.submit(self._write, step, copies, facts)

    def wait(self) -> None:
        """Until the last one is on the disk.

        Raises:
            Problem: If it could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def restore(self, state: Callable[[], dict[str, Tensor]]) -> tuple[int, dict[str, Any]] | None:
        """Fills tensors from the newest checkpoint that is whole.

        Args:
            state: Gives them by name, as they were saved; not called where there is no checkpoint. Those that are missing in it stay.

        Returns:
            Steps done, and the facts; None if there is no checkpoint.

        Raises:
            Problem: If there are some and none is whole, or it is of another model.
        """
        if self.folder is None:
            return None
        chosen = ranks.led(lambda: str(self._newest() or ""))
        if not chosen:
            return None
        place = Path(chosen)
        facts = json.loads((place / FACTS).read_text(encoding="utf-8"))
        present = {name: tensor for name, tensor in state().items() if name in facts["names"]}
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            try:
                _dcp().load(present, storage_reader=_dcp().HuggingFaceStorageReader(str(place)), no_dist=ranks.count() == 1)
            except (_dcp().api.CheckpointException, ValueError, RuntimeError) as error:
                raise Problem(
                    f"The checkpoint {place} does not fit the model: {str(error).strip().splitlines()[-1]}.", why="it is of another model.",
                    fix="another OUT folder.", code=Exit.INCOMPATIBLE,
                ) from error  # fmt: skip
        return facts["step"], facts["facts"]

    def _newest(self) -> Path | None:
        assert self.folder is not None
        for left in self.folder.glob("*.partial"):
            shutil.rmtree(left)
        there = sorted(self.folder.glob("step-*"), reverse=True)
        for place in there:
            if damage := damaged(place):
                self.tell(f"{place.name} is damaged ({damage}); going on from the one before it.")
            else:
                return place
        if there:
            raise Problem(
                f"None of the {len(there)} checkpoints in {self.folder} is whole.", why="their files are not those that were written.",
                fix="put the files back, or choose another OUT folder to begin again.", code=Exit.INCOMPATIBLE,
            )  # fmt: skip
        return None

    def _write(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        assert self.folder is not None
        final = self.folder / f"step-{step:08d}"
        partial = final.with_name(f"{final.name}.partial")
        try:
            partial.mkdir(parents=True, exist_ok=True)
            if self._group is None:
                save_file(tensors, partial / "model.safetensors")
            else:
                writer = _dcp().HuggingFaceStorageWriter(str(partial), save_distributed=True)
                _dcp().save(tensors, storage_writer=writer, process_group=self._group)
                distributed.barrier(self._group)
            if ranks.leads():
                write_json(partial / FACTS, {"step": step, "names": sorted(tensors), "facts": facts})
                for file in partial.iterdir():
                    _flush(file)
                write_json(partial / MANIFEST, hash_folder(partial))
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
                _flush(self.folder)
                self._thin_out()
        except Exception as error:
            if ranks.leads():
                shutil.rmtree(partial, ignore_errors=True)
            if "No space left" in str(error) and not isinstance(error, Problem):
                raise cannot_write(final, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error
            raise

    def _thin_out(self) -> None:
        """Removes all but the last ones and the milestones."""
        assert self.folder is not None
        for old in sorted(self.folder.glob("step-*[0-9]"))[: -self.keep]:
            if not self.milestones or int(old.name.removeprefix("step-")) % self.milestones:
                shutil.rmtree(old)


def _copied(tensor: Tensor) -> Tensor:
    """A copy that training does not change: of a shard where it is, of anything else in main memory."""
    if isinstance(tensor, DTensor):
        return tensor.detach().clone()
    return tensor.detach().to("cpu", copy=True).contiguous()


def damaged(place: Path) -> str:
    """What is wrong with a checkpoint, empty if nothing is."""
    try:
        digests = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{MANIFEST} cannot be read"
    return ", ".join(f"{name} {state}" for name, state in unlike(place, digests).items())


def _flush(place: Path) -> None:
    """Brings a file or folder to the disk."""
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _dcp() -> Any:
    """Torch's distributed checkpoints, which take a second to import."""
    import torch.distributed.checkpoint

    return torch.distributed.checkpoint
