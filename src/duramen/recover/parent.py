"""The dense model that a recovery looks up to."""

from __future__ import annotations

from duramen.assets import open_model
from duramen.calibrate.walker import Walk
from duramen.families.model import BlockModel, Model


def find_parent(model: BlockModel, name: str, walk: Walk, given: Model | None) -> BlockModel | None:
    """The dense model: the one given in memory, the one named, or what the recipe began with; None where there is none.

    Args:
        model: The model that is to be recovered; the dense one runs in the same type.
        name: Folder, embedded name, GGUF file or hub id; may be empty.
        walk: Knows the folder that the recipe began with, if an earlier step has edited it since.
        given: In memory.
    """
    if given is not None:
        return BlockModel.of(given)
    folder = open_model(name) if name else walk.parent
    if folder is None:
        return None
    return BlockModel.from_folder(folder, dtype=model.dtype, device=model.device, allow_generic=True)
