"""What is minimised: the negative log-likelihood of tokens, and the divergence from a teacher, whole or on its likeliest tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from duramen.train.data import Rows
from duramen.train.models import Course


def negative_log_likelihood(logs: Float[Tensor, "... V"], tokens: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Of every token under log-probabilities at its place."""
    return -logs.gather(-1, tokens[..., None])[..., 0]


def divergence(teacher: Float[Tensor, "... V"], student: Float[Tensor, "... V"]) -> Float[Tensor, "..."]:
    """KL(teacher ‖ student) of log-probabilities."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def surprise(logits: Float[Tensor, "... V"], tokens: Int[Tensor, "..."]) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Negative log-likelihood of every token, and the logarithm of its softmax' denominator, with one pass over the logits each way."""
    found: tuple[Tensor, Tensor] = _Surprise.apply(logits, tokens)
    return found


class _Surprise(torch.autograd.Function):
    """The gradient of both is the softmax times theirs, less that of the likelihood at the token."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logs = logits.log_softmax(-1)
        ctx.save_for_backward(logs, tokens)
        likelihood = -logs.gather(-1, tokens[..., None])[..., 0]
        return likelihood, logits.gather(-1, tokens[..., None])[..., 0] + likelihood

    @staticmethod
    def backward(ctx: Any, *of: Tensor) -> tuple[Tensor, None]:
        logs, tokens = ctx.saved_tensors
        gradient = logs.exp().mul_((of[0] + of[1])[..., None])
        return gradient.scatter_add_(-1, tokens[..., None], -of[0][..., None]), None


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
        course: The student, the model to learn from, if there is one, and the rows.
        share: Of the divergence from the teacher in the loss.
        temperature: By which the logits of both are divided in the divergence, which then counts its square.
        at_once: Rows that run together where nothing is learned.
    """

    course: Course
    share: float = 0.5
    temperature: float = 1.0
    at_once: int = 8

    @property
    def sequences(self) -> int:
        """How many rows there are."""
        return len(self.course.rows)

    def targets(self, index: int) -> int:
        """Target tokens of one row."""
        return self._targets[index]

    @cached_property
    def _targets(self) -> list[int]:
        counts: list[int] = self.course.rows.learned.sum(1).tolist()
        return counts

    def loss(self, indices: Sequence[int]) -> Tensor:
        """Sum over the target tokens of some rows."""
        return self.terms(self.course.rows[list(indices)])["loss"]

    def held_out(self) -> dict[str, float]:
        """Means over the target tokens of the held-out rows: of the loss, and of its terms."""
        aside = self.course.aside
        found: Counter[str] = Counter()
        for start in range(0, len(aside), self.at_once):
            for name, term in self.terms(aside[start : start + self.at_once]).items():
                found[name] += float(term)  # type: ignore[assignment]
        return {name: term / int(aside.learned.sum()) for name, term in found.items()}

    def terms(self, rows: Rows) -> dict[str, Tensor]:
        """Sums over the target tokens of some rows: the ``loss``, the negative log-``likelihood``, and with a teacher the ``divergence`` from it."""
        wanted = rows.learned[:, 1:].nonzero(as_tuple=True)
        logits = self._logits(self.course.network, rows)[wanted].float()
        logs = logits.log_softmax(-1)
        likelihood = negative_log_likelihood(logs, rows.tokens[:, 1:][wanted]).sum()
        if self.course.teacher is None:
            return {"loss": likelihood, "likelihood": likelihood}
        heat = self.temperature
        with torch.no_grad():
            taught = (self._logits(self.course.teacher, rows)[wanted].float() / heat).log_softmax(-1)
        apart = heat**2 * divergence(taught, logs if heat == 1 else (logits / heat).log_softmax(-1)).sum()
        loss = (1 - self.share) * likelihood + self.share * apart
        return {"loss": loss, "likelihood": likelihood, "divergence": apart}

    @staticmethod
    def _logits(network: nn.Module, rows: Rows) -> Float[Tensor, "S T-1 V"]:
        places = {} if rows.places is None else {"position_ids": rows.places}
        logits: Tensor = network(input_ids=rows.tokens, use_cache=False, **places).logits
        return logits[:, :-1]
