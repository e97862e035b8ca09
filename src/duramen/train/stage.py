"""A stage of training from nothing: what it is given, where it works, and what it leaves to those after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from duramen.problem import Problem

DATA, TOKENS, TOKENIZER, MODEL = "data", "tokens", "tokenizer", "model"
"""What stages leave, by the names of folders in theirs: documents, their token ids, a tokenizer, a model."""
WORK = "work"
"""Folder of a stage's own, which is not kept."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        folder: Its own, in which it goes on where it was stopped.
        given: What earlier stages left, by name.
        seed: Of everything that is drawn.
        told: Called with (steps done, held-out loss).
        said: Called with what it is doing.
    """

    folder: Path
    given: dict[str, Path]
    seed: int
    told: Callable[[int, float], None] = lambda step, loss: None
    said: Callable[[str], None] = lambda text: None

    def need(self, name: str, by: str) -> Path:
        """What an earlier stage left.

        Raises:
            Problem: If none did.
        """
        if name not in self.given:
            maker = {DATA: "curate", TOKENS: "tokenize", TOKENIZER: "tokenize", MODEL: "pretrain"}[name]
            raise Problem(
                f"`{by}` has no {name}.", why="no stage before it leaves any, and its settings name none.",
                fix=f"a stage `{maker}` before it.",
            )  # fmt: skip
        return self.given[name]
