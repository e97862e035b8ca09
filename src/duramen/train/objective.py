"""What is minimised: the negative log-likelihood of tokens, and the divergence from a teacher, whole or on its likeliest tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from duramen.train.data import Rows


def negative_log_likelihood(logs: Float[Tensor, "... V"], tokens: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Of every token under log-probabilities at its place."""
    return -logs.gather(-1, tokens[..., None])[..., 0]


def divergence(teacher: Float[Tensor, "... V"], student: Float[Tensor, "... V"]) -> Float[Tensor, "..."]:
    """KL(teacher ‖ student) of log-probabilities."""
    return (teacher.exp() * (teacher - student)).sum(-1)


@dataclass(frozen=True)
class Lesson:
    """A teacher's distributions over one sequence: its likeliest tokens [T, K], their log-probabilities, and that of all others."""

    tokens: Int[Tensor, "T K"]
    logs: Float[Tensor, "T K"]
    rest: Float[Tensor, "T"]


def log_rest(logs: Float[Tensor, "T K"]) -> Float[Tensor, "T"]:
    """log(1 − Σ exp): the log-probability of all other tokens, no less than e⁻⁶⁰."""
    return torch.log1p(-logs.exp().sum(-1).clamp_max(1 - 2**-24)).clamp_min(-60)


def bucketed_kl(lesson: Lesson, logs: Float[Tensor, "T V"]) -> Float[Tensor, "T"]:
    """KL(teacher ‖ student) over the likeliest tokens and one bucket for all others; never more than the KL over all tokens."""
    mine = logs.gather(-1, lesson.tokens)
    among = (lesson.logs.exp() * (lesson.logs - mine)).sum(-1)
    return among + lesson.rest.exp() * (lesson.rest - log_rest(mine))


@dataclass
class NextTokens:
    """The next tokens of documents, learned from the text and, with a share of the loss, from a teacher.

    Attributes:
        network: The student, a transformers model.
        teacher: The model to learn from; None to learn from the text alone.
        rows: What is trained on.
        aside: Held out.
        share: Of the divergence from the teacher in the loss.
        temperature: By which the logits of both are divided in the divergence, which then counts its square.
        at_once: Rows that run together where nothing is learned.
    """

    network: nn.Module
    teacher: nn.Module | None
    rows: Rows
    aside: Rows
    share: float = 0.5
    temperature: float = 1.0
    at_once: int = 8

    @property
    def sequences(self) -> int:
        """How many rows there are."""
        return len(self.rows)

    def targets(self, index: int) -> int:
        """Target tokens of one row."""
        return self._targets[index]

    @cached_property
    def _targets(self) -> list[int]:
        counts: list[int] = self.rows.learned.sum(1).tolist()
        return counts

    def loss(self, indices: Sequence[int]) -> Tensor:
        """Sum over the target tokens of some rows."""
        return self._loss(self.rows[list(indices)])

    def held_out(self) -> float:
        """Mean over the target tokens of the held-out rows."""
        parts = [self.aside[start : start + self.at_once] for start in range(0, len(self.aside), self.at_once)]
        return sum(float(self._loss(part)) for part in parts) / int(self.aside.learned.sum())

    def _loss(self, rows: Rows) -> Tensor:
        wanted = rows.learned[:, 1:].nonzero(as_tuple=True)
        logits = self._logits(self.network, rows)[wanted].float()
        logs = logits.log_softmax(-1)
        loss = negative_log_likelihood(logs, rows.tokens[:, 1:][wanted]).sum()
        if self.teacher is None:
            return loss
        heat = self.temperature
        with torch.no_grad():
            taught = (self._logits(self.teacher, rows)[wanted].float() / heat).log_softmax(-1)
        apart = heat**2 * divergence(taught, logs if heat == 1 else (logits / heat).log_softmax(-1)).sum()
        return (1 - self.share) * loss + self.share * apart

    @staticmethod
    def _logits(network: nn.Module, rows: Rows) -> Float[Tensor, "S T-1 V"]:
        places = {} if rows.places is None else {"position_ids": rows.places}
        logits: Tensor = network(input_ids=rows.tokens, use_cache=False, **places).logits
        return logits[:, :-1]
