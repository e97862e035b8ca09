"""How near a candidate comes to the dense model: KL of its next-token distributions, or its own loss, many candidates side by side.

All candidates see the same tokens. They run through the model together, and those that agree in all blocks so far share one state, so
what a child has in common with its parent is computed once, exactly, and every block is opened once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from duramen.families.model import BlockModel, OpenBlock, run_block
from duramen.search.database import Module, numbers_in
from duramen.train.objective import Lesson, bucketed_kl, log_rest, negative_log_likelihood

TOKENS_AT_ONCE = 2**17
"""Tokens of all candidates together whose hidden states are held at once, before and after a block."""
Choices = tuple[Any, ...]
"""What a candidate is: one choice for every module, in running order; choices can be sorted."""


class Variants(Protocol):
    """What the candidates are variants of: a dense model whose open blocks can be had as each choice wants them."""

    @property
    def model(self) -> BlockModel:
        """The dense model."""

    @property
    def modules(self) -> Sequence[Module]:
        """What is chosen for, in running order."""

    def at(self, block: OpenBlock, choices: Mapping[int, Any]) -> AbstractContextManager[None]:
        """An open block with some of its modules, by number, as chosen for a while."""


@torch.no_grad()
def teach(model: BlockModel, sequences: Int[Tensor, "N T"], top_k: int) -> list[Lesson]:
    """What the dense model says of every sequence."""
    lessons = []
    for hidden in model.last_hidden(torch.split(sequences, 1)):
        tops = [logs.topk(min(top_k, logs.shape[-1]), dim=-1) for logs in model.log_probabilities(hidden)]
        values = torch.cat([top.values for top in tops])
        lessons.append(Lesson(torch.cat([top.indices for top in tops]), values, log_rest(values)))
    return lessons


@torch.no_grad()
def last_states(
    variants: Variants, candidates: Sequence[Choices], sequences: Int[Tensor, "N T"]
) -> list[Float[Tensor, "N T D"]]:
    """The hidden states of every candidate after the last block."""
    model = variants.model
    hidden, calls = model.capture(sequences)
    states: dict[Choices, Tensor] = {(): hidden}
    for index in range(len(model.blocks)):
        here = numbers_in(variants.modules, index)
        with model.opened(index) as block:
            after = {}
            for prefix, state in states.items():
                before = len(prefix)
                mine = {each[before : before + len(here)] for each in candidates if each[:before] == prefix}
                for choice in sorted(mine):
                    with variants.at(block, dict(zip(here, choice, strict=True))):
                        after[prefix + choice] = run_block(block.module, state, calls[index])
            states = after
    return [states[each] for each in candidates]


@torch.no_grad()
def divergences(
    variants: Variants, candidates: Sequence[Choices], sequences: Int[Tensor, "N T"], lessons: Sequence[Lesson]
) -> list[float]:
    """Mean KL(dense ‖ candidate) per token of every candidate, in nats; NaN where a candidate's outputs are not finite.

    Args:
        variants: What the candidates are variants of.
        candidates: The candidates.
        sequences: Token ids, the same for all.
        lessons: What the dense model says of them.
    """
    return _in_runs(
        candidates,
        sequences,
        lambda run: [_divergence(variants.model, s, lessons) for s in last_states(variants, run, sequences)],
    )


@torch.no_grad()
def losses(variants: Variants, candidates: Sequence[Choices], sequences: Int[Tensor, "N T"]) -> list[float]:
    """Mean negative log-likelihood per token of every candidate, in nats."""
    return _in_runs(
        candidates, sequences, lambda run: [_loss(variants.model, s, sequences) for s in last_states(variants, run, sequences)]
    )


def _in_runs(
    candidates: Sequence[Choices], sequences: Int[Tensor, "N T"], measure: Callable[[Sequence[Choices]], list[float]]
) -> list[float]:
    """Measures so many candidates at a time that their states fit in memory."""
    runs = runs_of(candidates, max(1, TOKENS_AT_ONCE // sequences.numel()))
    return put_back(runs, [measure([candidates[number] for number in run]) for run in runs])


def runs_of(candidates: Sequence[Choices], size: int) -> list[list[int]]:
    """The numbers of the candidates in sorted order, in runs of so many: neighbours have the first blocks in common."""
    order = sorted(range(len(candidates)), key=lambda number: candidates[number])
    return [order[start : start + size] for start in range(0, len(order), size)]


def put_back(runs: Sequence[Sequence[int]], figures: Sequence[Sequence[float]]) -> list[float]:
    """The figures of all runs, in the order of the candidates."""
    found = {number: figure for run, mine in zip(runs, figures, strict=True) for number, figure in zip(run, mine, strict=True)}
    return [found[number] for number in range(len(found))]


def draw_rows(pool: Int[Tensor, "N T"], tokens: int, generator: torch.Generator) -> list[int]:
    """So many tokens' worth of sequences of a pool, at least one and at most all, sorted."""
    count = min(len(pool), max(1, tokens // pool.shape[1]))
    return sorted(torch.randperm(len(pool), generator=generator)[:count].tolist())


def _divergence(model: BlockModel, hidden: Float[Tensor, "N T D"], lessons: Sequence[Lesson]) -> float:
    total, count = 0.0, 0
    for state, lesson in zip(torch.split(hidden, 1), lessons, strict=True):
        logs = torch.cat(list(model.log_probabilities(state)))
        total += float(bucketed_kl(lesson, logs).sum(dtype=torch.float64))
        count += len(logs)
    return total / count


def _loss(model: BlockModel, hidden: Float[Tensor, "N T D"], sequences: Int[Tensor, "N T"]) -> float:
    total, count = 0.0, 0
    for state, tokens in zip(torch.split(hidden, 1), sequences, strict=True):
        logs = torch.cat(list(model.log_probabilities(state[:, :-1])))
        total += float(negative_log_likelihood(logs, tokens[1:].to(logs.device)).sum(dtype=torch.float64))
        count += len(logs)
    return total / count
