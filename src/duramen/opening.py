"""Opening a model folder as it was measured: with the rounding that its formats ask for, and prompts that get shorter where it says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from duramen.families.checkpoint import Checkpoint
from duramen.families.model import BlockModel
from duramen.rounding import start_rounding
from duramen.rundir import read_formats
from duramen.tokens.folder import ReducedModel, read_reduction
from duramen.tokens.model import Reduced


def load(folder: str | Path, **options: Any) -> nn.Module:
    """Opens a model folder whole, as it was measured: it rounds what its formats say, and one that shortens its prompts has ``reduced``, which says what is left of them.

    Args:
        folder: A Hugging Face folder.
        **options: Of ``AutoModelForCausalLM.from_pretrained``.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    Checkpoint(folder)  # from here on transformers knows its type, also where it is one of ours
    network: nn.Module = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    start_rounding(network, read_formats(folder))
    reduction = read_reduction(folder)
    if reduction is not None:
        network.reduced = Reduced(network, reduction)  # type: ignore[assignment]
    return network


def open_blocks(folder: Path, **options: Any) -> BlockModel:
    """Opens a model folder block by block, as it was measured; the options are those of ``BlockModel.from_folder``."""
    model, reduction = BlockModel.from_folder(folder, **options), read_reduction(folder)
    return model if reduction is None else ReducedModel(model, reduction)


def runs_plainly(folder: Path) -> bool:
    """Whether plain transformers opens the model that was measured, too."""
    return read_reduction(folder) is None and not any(each.runs for each in read_formats(folder).values())
