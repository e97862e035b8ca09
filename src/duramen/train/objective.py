"""What is minimised: the negative log-likelihood of tokens, and the divergence from a teacher, whole or on its likeliest tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


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
