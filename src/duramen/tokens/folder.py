"""A model folder that says how its prompts are shortened: ``reduction.json`` beside weights that stay as they are.

Plain transformers opens the dense model; ``duramen.load`` the one that shortens its prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from duramen.families.model import BlockModel, run_block
from duramen.problem import Exit, Problem
from duramen.tokens.model import Reduced, Reduction

FILE = "reduction.json"


def read_reduction(folder: Path) -> Reduction | None:
    """How the prompts of a folder's model are shortened; None if they are not.

    Raises:
        Problem: If the file is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        return Reduction.model_validate_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Problem(
            f"{file} cannot be read: {error}.",
            why="it was changed by hand, or is of another version.",
            fix="run the recipe again; without the file the folder is the dense model.",
            code=Exit.INCOMPATIBLE,
        ) from error


def no_likelihood() -> Problem:
    """What is said where tokens would be scored that are part of a shortened prompt."""
    return Problem(
        "Tokens inside a prompt that is shortened have no likelihood.",
        why="what leaves and what merges is decided by the whole prompt, so its tokens would be told of those that follow.",
        fix="score what comes after a context (`context` in the evaluate step, `--context`).",
    )


class ReducedModel(BlockModel):
    """A model that shortens what comes before the part that is scored, block by block.

    Attributes:
        reduced: What shortens it.
        prompts: What was left of the batches that ran last.
    """

    def __init__(self, model: BlockModel, reduction: Reduction) -> None:
        super().__init__(model.network, model.family, model.checkpoint, model.dtype, model.device)
        self.reduced = Reduced(self.network, reduction)

    def last_hidden(self, batches: Iterable[Tensor], starts: Iterable[Sequence[int]] | None = None) -> list[Tensor]:
        """The hidden states after the last block, [B, T, D], every token in its place; NaN where one has left.

        Raises:
            Problem: Without ``starts``.
        """
        if starts is None:
            raise no_likelihood()
        self._returned  # noqa: B018 it is seen on a prompt of its own
        captured, self.prompts = [], []
        for batch, beginnings in zip(batches, starts, strict=True):
            self.reduced.protect = torch.arange(batch.shape[1]) >= torch.as_tensor(beginnings)[:, None]
            captured.append(self.capture(batch))
            self.prompts.append(self.reduced.prompt)
        hidden = [item for item, _ in captured]
        for index in range(len(self.blocks)):
            with self.opened(index) as block:
                for number, (_, calls) in enumerate(captured):
                    self.reduced.prompt = self.prompts[number]
                    hidden[number] = run_block(block.module, hidden[number], calls[index])
        return [prompt.spread(state) for prompt, state in zip(self.prompts, hidden, strict=True)]
