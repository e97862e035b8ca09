"""Zero-shot likelihood tasks: which continuation does the model find most likely?

One scorer for all tasks. Context and continuation are tokenised together and split at the context's own length; a choice's
score is the sum of its token log-probabilities. ``acc`` takes the best sum, ``acc_norm`` the best sum per character of the
continuation. A task with a single choice (LAMBADA) is right if every token of it is the greedy one.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duramen.assets import get_asset, read_requests
from duramen.calibrate.tokens import opening
from duramen.families.model import BlockModel

BATCH_TOKENS = 4096
"""Padded tokens of one forward batch."""
UNCONDITIONAL = 1_000_000
"""Document ids from here on repeat the requests without their context; they are not scored."""


@dataclass(frozen=True)
class Request:
    """One (document, choice): token ids, where the continuation starts, its characters, and the right choice."""

    document: int
    choice: int
    ids: list[int]
    start: int
    characters: int
    label: int


@dataclass(frozen=True)
class TaskScores:
    """Right or wrong per document, [S] each, 0 or 1."""

    acc: np.ndarray
    acc_norm: np.ndarray


def load_requests(name: str, tokenizer: Any, documents: int) -> list[Request]:
    """Reads the first ``documents`` documents of an embedded task."""
    found: list[Request] = []
    seen: set[int] = set()
    begin = opening(tokenizer)
    for row in read_requests(get_asset(name, "task").path()):
        if row["doc_id"] >= UNCONDITIONAL:
            continue
        if row["doc_id"] not in seen and len(seen) == documents:
            break
        seen.add(row["doc_id"])
        context, continuation = row["request"]["context"], row["request"]["continuation"]
        ids = begin + tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        start = len(begin) + len(tokenizer(context, add_special_tokens=False)["input_ids"])
        label = row["label"] if isinstance(row["label"], int) else 0
        found.append(Request(row["doc_id"], row["idx"], ids, max(1, min(start, len(ids) - 1)), len(continuation), label))
    return found


@torch.no_grad()
def score_requests(model: BlockModel, requests: list[Request]) -> list[tuple[float, bool]]:
    """(sum of log-probabilities, whether every token is the greedy one) of each request's continuation.

    Batches are padded on the right, which a causal model does not see.
    """
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].ids))
    batches = _batches(order, requests)
    starts = [[requests[i].start for i in batch] for batch in batches]
    hidden = model.last_hidden((_pad([requests[i].ids for i in batch]) for batch in batches), starts)
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    for batch, state in zip(batches, hidden, strict=True):
        for i, score in zip(batch, _score_batch(model, state, [requests[i] for i in batch]), strict=True):
            scores[i] = score
    return scores


def _batches(order: list[int], requests: list[Request]) -> list[list[int]]:
    batches: list[list[int]] = [[]]
    for i in order:
        if batches[-1] and (len(batches[-1]) + 1) * len(requests[i].ids) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(i)
    return batches


def _pad(rows: list[list[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def _score_batch(model: BlockModel, state: Tensor, requests: list[Request]) -> list[tuple[float, bool]]:
    """Only the positions that predict a continuation reach the head."""
    positions = [(row, place - 1) for row, item in enumerate(requests) for place in range(item.start, len(item.ids))]
    targets = torch.tensor([item.ids[place] for item in requests for place in range(item.start, len(item.ids))])
    rows, places = torch.tensor(positions).T
    picked = state[rows, places]
    logs, greedy = [], []
    for log in model.log_probabilities(picked[None]):
        target, targets = targets[: len(log)].to(log.device), targets[len(log) :]
        logs.append(log.gather(1, target[:, None])[:, 0])
        greedy.append(log.argmax(-1) == target)
    log_all, greedy_all = torch.cat(logs), torch.cat(greedy)
    lengths = [len(item.ids) - item.start for item in requests]
    return [
        (float(log.sum(dtype=torch.float64)), bool(right.all()))
        for log, right in zip(torch.split(log_all, lengths), torch.split(greedy_all, lengths), strict=True)
    ]


def grade(requests: list[Request], scores: list[tuple[float, bool]]) -> TaskScores:
    """Turns scores of choices into right or wrong per document."""
    by_document: dict[int, list[tuple[Request, float, bool]]] = defaultdict(list)
    for item, (score, greedy) in zip(requests, scores, strict=True):
        by_document[item.document].append((item, score, greedy))
    acc, acc_norm = [], []
    for choices in by_document.values():
        if len(choices) == 1:
            acc.append(choices[0][2])
            acc_norm.append(choices[0][2])
            continue
        label = choices[0][0].label
        acc.append(max(choices, key=lambda c: c[1])[0].choice == label)
        acc_norm.append(max(choices, key=lambda c: c[1] / c[0].characters)[0].choice == label)
    return TaskScores(np.array(acc, dtype=float), np.array(acc_norm, dtype=float))
