"""Which weights of a model must stay zero: what its mask says, where one lies beside it; else all zeros of a weight that is sparse, but for codes that happen to be zero."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file
from torch import Tensor

from duramen.families.model import BlockModel
from duramen.prune.pattern import lasting_zeros
from duramen.rundir import MASKS, read_formats, unpack_mask


class Masks:
    """The masks of a model, by full layer name."""

    def __init__(self, model: BlockModel) -> None:
        file = None if model.checkpoint is None else model.checkpoint.folder / MASKS
        formats = {} if model.checkpoint is None else read_formats(model.checkpoint.folder)
        self.coded = {name for name, each in formats.items() if each.weights}
        self.packed: dict[str, Tensor] = load_file(file) if file is not None and file.is_file() else {}

    def removed(self, name: str, weight: Float[Tensor, "O I"]) -> Bool[Tensor, "O I"]:
        """Where a layer's weight, as stored, must stay zero."""
        if name in self.packed:
            return unpack_mask(self.packed[name], weight.shape[1]).to(weight.device)
        return torch.zeros_like(weight, dtype=torch.bool) if name in self.coded else lasting_zeros(weight)
