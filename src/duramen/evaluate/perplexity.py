"""Perplexity, and divergence from the dense model on the same tokens.

Both stream the model block by block, so a model larger than memory can be measured. Windows are disjoint (stride = length);
the mean runs over the T − 1 predicted tokens of every window, or over those after a context that is only read. Only Gemma's windows begin with a BOS.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from duramen.families.model import BlockModel
from duramen.intervals import Measured, mean_interval


@torch.no_grad()
def final_hidden(model: BlockModel, windows: Tensor, context: int = 0) -> list[Tensor]:
    """Hidden states after the last block, one [1, T, D] per window of ``windows`` [S, T], of which the first ``context`` tokens are only read."""
    return model.last_hidden(torch.split(windows, 1), [[context]] * len(windows) if context else None)


def _slices(model: BlockModel, hidden: Tensor, window: Tensor, context: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(log-probabilities [n, V], next tokens [n]) for the predicted positions of one window."""
    start, window = max(context, 1), window.to(hidden.device)
    for logs in model.log_probabilities(hidden[:, start - 1 : -1]):
        yield logs, window[start : start + len(logs)]
        start += len(logs)


@torch.no_grad()
def token_losses(model: BlockModel, hidden: Sequence[Tensor], windows: Tensor, context: int = 0) -> Tensor:
    """Negative log-likelihood of every predicted token in nats, [S, T − max(context, 1)]."""
    rows = []
    for state, window in zip(hidden, windows, strict=True):
        parts = [-log.gather(1, target[:, None])[:, 0].cpu() for log, target in _slices(model, state, window, context)]
        rows.append(torch.cat(parts))
    return torch.stack(rows)


@dataclass(frozen=True)
class Divergence:
    """Per window, [S] each: mean nats of loss, mean KL(dense ‖ edited) in nats, share of equal top-1 tokens."""

    loss: np.ndarray
    kl: np.ndarray
    agreement: np.ndarray


@torch.no_grad()
def divergence(
    dense: BlockModel,
    dense_hidden: Sequence[Tensor],
    edited: BlockModel,
    hidden: Sequence[Tensor],
    windows: Tensor,
    context: int = 0,
) -> Divergence:
    """Compares two models of one tokenizer on the same windows [S, T], given their final hidden states."""
    rows = []
    for before, after, window in zip(dense_hidden, hidden, windows, strict=True):
        sums = torch.zeros(3, dtype=torch.float64, device=after.device)
        for (p, target), (q, _) in zip(
            _slices(dense, before, window, context), _slices(edited, after, window, context), strict=True
        ):
            sums[0] -= q.gather(1, target[:, None]).sum()
            sums[1] += (p.exp() * (p - q)).sum()
            sums[2] += (p.argmax(-1) == q.argmax(-1)).sum()
        rows.append(sums.cpu() / (len(window) - max(context, 1)))
    loss, kl, agreement = torch.stack(rows).numpy().T
    return Divergence(loss, kl, agreement)


def perplexity(losses: np.ndarray) -> Measured:
    """Exp of the mean loss, with its interval over windows; losses in nats per window, [S]."""
    return mean_interval(losses, transform=np.exp)
