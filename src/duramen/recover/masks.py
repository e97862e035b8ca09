"""Which weights of a model must stay zero: what its mask says, where one lies beside it; else all zeros of a weight that is sparse."""

from __future__ import annotations

from jaxtyping import Bool, Float
from safetensors.torch import load_file
from torch import Tensor

from duramen.families.model import BlockModel
from duramen.prune.pattern import lasting_zeros
from duramen.rundir import MASKS, unpack_mask


class Masks:
    """The masks of a model, by full layer name."""

    def __init__(self, model: BlockModel) -> None:
        file = None if model.checkpoint is None else model.checkpoint.folder / MASKS
        self.packed: dict[str, Tensor] = load_file(file) if file is not None and file.is_file() else {}

    def removed(self, name: str, weight: Float[Tensor, "O I"]) -> Bool[Tensor, "O I"]:
        """Where a layer's weight, as stored, must stay zero."""
        if name in self.packed:
            return unpack_mask(self.packed[name], weight.shape[1]).to(weight.device)
        return lasting_zeros(weight)
