"""What training can ask for beside the output: attention maps, queries and keys as the dense model has them.

"EdgeQAT" (Shen et al., arXiv 2402.10787) asks that maps be alike and that queries and keys spread out. Its printed loss of maps has the wrong sign, so that minimising it
pulls them apart (method sheet, 2.11); here every loss of maps is zero for equal maps and falls as they agree. They are taken after mask and softmax, since before it half of
the entries are future positions, and what is added to a whole row changes nothing. All losses are sums over the target tokens; a sequence's part depends on no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from duramen.attention import Seen

MapLoss = Literal["off", "row_kl", "row_cos", "log_cos", "out_mse", "logit_mse"]
EntropyLoss = Literal["off", "match", "gauss_kl", "paper", "code"]
ROWS = 128
"""Rows of a map that exist at once; they are made again in the backward pass."""
NOWHERE = -1e30
"""Logits of what may not be seen; finite, so that nothing times zero is not a number."""


def map_loss(kind: MapLoss, student: Sequence[Seen], teacher: Sequence[Seen], wanted: Bool[Tensor, "B T"]) -> Float[Tensor, ""]:
    """How far the attention maps of a student are from a teacher's, summed over the wanted rows, the mean over layers and heads.

    Args:
        kind: ``row_kl``: Σ A_f log(A_f/A_q) of every row. ``row_cos``: 1 − cosine of the rows. ``log_cos``: −log of the mean cosine of whole maps, over layers and heads:
            the published form, with the right sign. ``out_mse``: squared distance of what the row reads, of its square (arXiv 2211.11014). ``logit_mse``: mean squared
            distance of the logits that may be seen, about their means.
        student: What every layer's attention was called with.
        teacher: The same of the teacher.
        wanted: Rows that count: those that predict a target.
    """
    if kind == "log_cos":
        cosines = torch.stack([_whole_cosines(mine, theirs, wanted) for mine, theirs in zip(student, teacher, strict=True)])
        return -(cosines.mean(0).clamp_min(1e-6).log() * wanted.sum(1)).sum()
    row_loss = _ROW_LOSSES[kind]
    total = wanted.new_zeros((), dtype=torch.float32)
    for mine, theirs in zip(student, teacher, strict=True):
        for rows in _parts(mine):
            found = checkpoint(row_loss, mine, theirs, rows, use_reentrant=False)
            total = total + (found.mean(1) * wanted[:, rows]).sum()
    return total / len(student)


def entropy_loss(
    kind: EntropyLoss, student: Sequence[Seen], teacher: Sequence[Seen], wanted: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """How the spread of queries and keys differs from a teacher's, or how small it is; a sequence counts as often as it has wanted tokens.

    Args:
        kind: ``match`` (ours): ½(log σ² − log σ_f²)² of every head, over tokens and channels. ``gauss_kl``: the divergence of a Gaussian of every channel of a head. ``paper``:
            −log Σ log(1 + σ_q²σ_k²) over layers and heads (Eq. 12). ``code``: −log Σ log(1 + variance over a head's channels), for queries and keys of every token, as
            the published code has it. The last two look at no teacher.
        student: What every layer's attention was called with.
        teacher: The same of the teacher.
        wanted: Tokens that count.
    """
    per_sequence = torch.stack(
        [_ENTROPY_PARTS[kind](mine, theirs, wanted) for mine, theirs in zip(student, teacher, strict=True)]
    )
    found = per_sequence.mean(0) if kind in ("match", "gauss_kl") else -per_sequence.sum(0).log()
    return (found * wanted.sum(1)).sum()


def _parts(seen: Seen) -> list[slice]:
    length = seen.query.shape[2]
    return [slice(first, min(first + ROWS, length)) for first in range(0, length, ROWS)]


def _logits(seen: Seen, rows: slice) -> Float[Tensor, "B H t S"]:
    """Masked."""
    return seen.logits(rows).float().masked_fill(~seen.allowed(rows), NOWHERE)


def attention_map(seen: Seen, rows: slice) -> Float[Tensor, "B H t S"]:
    """After mask and softmax."""
    return _logits(seen, rows).softmax(-1)


def _row_kl(mine: Seen, theirs: Seen, rows: slice) -> Float[Tensor, "B H t"]:
    student, teacher = (_logits(each, rows).log_softmax(-1) for each in (mine, theirs))
    return (teacher.exp() * (teacher - student)).sum(-1)


def _row_cos(mine: Seen, theirs: Seen, rows: slice) -> Float[Tensor, "B H t"]:
    student, teacher = (attention_map(each, rows) for each in (mine, theirs))
    return 1 - torch.cosine_similarity(student, teacher, dim=-1)


def _out_mse(mine: Seen, theirs: Seen, rows: slice) -> Float[Tensor, "B H t"]:
    student, teacher = (_read(each, rows) for each in (mine, theirs))
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(1e-12)


def _read(seen: Seen, rows: slice) -> Float[Tensor, "B H t P"]:
    values = seen.value.float().repeat_interleave(seen.query.shape[1] // seen.value.shape[1], 1)
    return attention_map(seen, rows) @ values


def _logit_mse(mine: Seen, theirs: Seen, rows: slice) -> Float[Tensor, "B H t"]:
    allowed = theirs.allowed(rows)
    count = allowed.sum(-1).clamp_min(1)
    apart = (mine.logits(rows).float() - theirs.logits(rows).float()).masked_fill(~allowed, 0)
    centred = (apart - (apart.sum(-1) / count)[..., None]).masked_fill(~allowed, 0)
    return centred.square().sum(-1) / count


_ROW_LOSSES: dict[str, Callable[[Seen, Seen, slice], Tensor]] = {
    "row_kl": _row_kl, "row_cos": _row_cos, "out_mse": _out_mse, "logit_mse": _logit_mse,
}  # fmt: skip


def _whole_cosines(mine: Seen, theirs: Seen, wanted: Bool[Tensor, "B T"]) -> Float[Tensor, "B"]:
    """Cosine of whole maps on their wanted rows, the mean over heads."""
    sums = [checkpoint(_products, mine, theirs, rows, wanted, use_reentrant=False) for rows in _parts(mine)]
    both, own, other = torch.stack(sums).sum(0)
    cosines: Tensor = both / (own * other).sqrt().clamp_min(1e-12)
    return cosines.mean(1)


def _products(mine: Seen, theirs: Seen, rows: slice, wanted: Tensor) -> Float[Tensor, "3 B H"]:
    counted = wanted[:, None, rows, None]
    student, teacher = (attention_map(each, rows) * counted for each in (mine, theirs))
    return torch.stack(
        [(left * right).sum((2, 3)) for left, right in ((student, teacher), (student, student), (teacher, teacher))]
    )


def _spread(x: Float[Tensor, "B n T P"], wanted: Bool[Tensor, "B T"]) -> Float[Tensor, "B n"]:
    """Variance of every head over the wanted tokens and its channels."""
    weight = wanted[:, None, :, None].to(torch.float32)
    count = (weight.sum((2, 3)) * x.shape[-1]).clamp_min(1)
    mean = (x.float() * weight).sum((2, 3)) / count
    return ((x.float() - mean[:, :, None, None]).square() * weight).sum((2, 3)) / count


def _match(mine: Seen, theirs: Seen, wanted: Tensor) -> Float[Tensor, "B"]:
    total = wanted.new_zeros(len(wanted), dtype=torch.float32)
    for own, other in ((mine.query, theirs.query), (mine.key, theirs.key)):
        student, teacher = (_spread(each, wanted).clamp_min(1e-12).log() for each in (own, other))
        total = total + (student - teacher).square().mean(1) / 2
    return total


def _gauss_kl(mine: Seen, theirs: Seen, wanted: Tensor) -> Float[Tensor, "B"]:
    """Of every channel, over the wanted tokens: log(σ_q/σ_f) + (σ_f² + (μ_f − μ_q)²)/(2σ_q²) − ½."""
    weight = wanted[:, None, :, None].to(torch.float32)
    count = weight.sum(2).clamp_min(1)
    total = wanted.new_zeros(len(wanted), dtype=torch.float32)
    for own, other in ((mine.query, theirs.query), (mine.key, theirs.key)):
        means, variances = [], []
        for each in (own, other):
            mean = (each.float() * weight).sum(2) / count
            variance = ((each.float() - mean[:, :, None]).square() * weight).sum(2) / count
            means.append(mean)
            variances.append(variance.clamp_min(1e-12))
        apart = (variances[1] + (means[1] - means[0]).square()) / (2 * variances[0])
        total = total + ((variances[0] / variances[1]).log() / 2 + apart - 0.5).mean((1, 2))
    return total


def _paper(mine: Seen, _: Seen, wanted: Tensor) -> Float[Tensor, "B"]:
    """Σ over query heads of log(1 + σ_q²σ_k²), a head's key being that of its group (our reading where heads share one)."""
    queries, keys = (_spread(each, wanted) for each in (mine.query, mine.key))
    return torch.log1p(queries * keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)).sum(1)


def _code(mine: Seen, _: Seen, wanted: Tensor) -> Float[Tensor, "B"]:
    found = wanted.new_zeros(len(wanted), dtype=mine.query.dtype)
    for each in (mine.query, mine.key):
        found = found + (torch.log1p(each.var(-1)) * wanted[:, None]).sum((1, 2))
    return found


_ENTROPY_PARTS: dict[str, Callable[[Seen, Seen, Tensor], Tensor]] = {
    "match": _match, "gauss_kl": _gauss_kl, "paper": _paper, "code": _code,
}  # fmt: skip


def code_entropy(codes: Tensor) -> float:
    """Entropy of the codes of a matrix, bits; no more than those of its grid."""
    shares = torch.unique(codes, return_counts=True)[1].double() / codes.numel()
    return float(-(shares * shares.log()).sum() / math.log(2))
