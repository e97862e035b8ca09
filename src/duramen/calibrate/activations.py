"""Hidden states of every batch: in memory up to a stated budget, beyond it on disk."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from duramen.finite import all_finite
from duramen.problem import Exit, Problem
from duramen.rundir import cannot_write


class Budget:
    """Bytes of activations that may be held in memory, shared by all that hold some."""

    def __init__(self, limit: int) -> None:
        self.left = limit

    def take(self, size: int) -> bool:
        """Takes ``size`` bytes if so many are left."""
        if size > self.left:
            return False
        self.left -= size
        return True


class Activations:
    """One tensor per batch, each [B, T, D].

    Args:
        tensors: The first values; may be an iterator, so that they need not all be in memory at once.
        budget: What does not fit in it goes to disk and stays there.
        folder: Where to; created when it is needed.
    """

    def __init__(self, tensors: Iterable[Tensor], budget: Budget, folder: Path) -> None:
        self.budget, self.folder = budget, folder
        self._held: list[Tensor | None] = []
        self._device = torch.device("cpu")
        for tensor in tensors:
            self._device = tensor.device
            held = budget.take(tensor.nbytes)
            self._held.append(tensor if held else None)
            if not held:
                self._write(len(self._held) - 1, tensor)

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, batch: int) -> Tensor:
        held = self._held[batch]
        return load_file(self._file(batch))["hidden"].to(self._device) if held is None else held

    def __setitem__(self, batch: int, tensor: Tensor) -> None:
        if self._held[batch] is None:
            self._write(batch, tensor)
        else:
            self._held[batch] = tensor

    def _file(self, batch: int) -> Path:
        return self.folder / f"{batch:05d}.safetensors"

    def _write(self, batch: int, tensor: Tensor) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"hidden": tensor.cpu().contiguous()}, self._file(batch))
        except (OSError, SafetensorError) as error:
            raise cannot_write(self._file(batch), OSError(errno.ENOSPC, str(error))) from error


def check_activations(hidden: Tensor, name: str) -> None:
    """Stops on activations [B, T, D] that are not finite, naming where they are."""
    why = "the model overflows in this type, or an earlier layer is damaged."
    check_numbers(hidden, f"The activations at {name} are not finite.", why=why)


def check_numbers(tensor: Tensor, what: str, *, why: str) -> None:
    """Stops on a computed tensor that is not finite, saying what it is."""
    if not all_finite(tensor):
        fix = "run in float32 (`dtype: float32`); finished blocks are kept."
        raise Problem(what, why=why, fix=fix, code=Exit.CHECK_FAILED)
