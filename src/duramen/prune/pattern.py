"""Which entries of a weight matrix are removed: a share of them, or N of every M.

One convention: ``"kept:group"`` counts the weights that *stay* (``"2:4"`` keeps two of four, ``"1:4"`` keeps one).
Counts are exact. Ties are broken by ascending flat index, so a mask is a function of its scores alone.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from duramen.problem import Problem

SAMPLE = 8191
"""Values that bracket a rank among many more."""
SPARSE_FROM = 0.15
"""Share of zeros from which a weight counts as sparse already; dequantized weights have some by chance, up to 0.11 of those of four bits that we have seen."""
Scope = Literal["row", "layer"]
SCOPES: tuple[Scope, ...] = ("row", "layer")


@dataclass(frozen=True)
class Pattern:
    """A share of weights to remove (``sparsity``) or ``kept`` of every ``group`` consecutive inputs."""

    sparsity: float | None = None
    kept: int = 0
    group: int = 0

    @property
    def grouped(self) -> bool:
        """Whether this is an N:M pattern."""
        return self.sparsity is None

    @property
    def share(self) -> float:
        """The asked share of removed weights, in [0, 1)."""
        return self.sparsity if self.sparsity is not None else 1 - self.kept / self.group

    def quota(self, size: int) -> int:
        """Exact number of weights to remove out of ``size`` (unstructured patterns only)."""
        assert self.sparsity is not None
        return round(self.sparsity * size)

    def total(self, outputs: int, inputs: int, scope: Scope = "layer") -> int:
        """Exact number of weights removed from a matrix of this shape."""
        if self.grouped:
            return outputs * (inputs // self.group) * (self.group - self.kept)
        return outputs * self.quota(inputs) if scope == "row" else self.quota(outputs * inputs)

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}" if self.grouped else f"{self.sparsity:.0%}"


def parse_pattern(sparsity: float | None = None, pattern: str | None = None) -> Pattern:
    """Reads the two user settings, of which exactly one must be given.

    Args:
        sparsity: Share of weights to remove, in [0, 1).
        pattern: ``"kept:group"``, such as ``"2:4"``; at least one and fewer than all weights of a group stay.

    Raises:
        Problem: If both or none are given, or a value is out of range.
    """
    if (sparsity is None) == (pattern is None):
        raise Problem(
            "Give exactly one of `sparsity` and `pattern`.",
            why=f"got sparsity={sparsity!r} and pattern={pattern!r}; they are two ways to say how much goes.",
            fix='`sparsity: 0.5` for half of the weights, or `pattern: "2:4"` to keep two of every four.',
        )
    if sparsity is not None:
        return _share(sparsity)
    assert pattern is not None
    return _groups(str(pattern))


def _share(sparsity: float) -> Pattern:
    if not 0 <= sparsity < 1:
        raise Problem(
            f"`sparsity` must be at least 0 and below 1, got {sparsity}.",
            why="it is the share of weights to remove: 0 removes none, 0.5 half of them; 1 would leave nothing.",
            fix=f"`sparsity: {sparsity / 100:g}` if you meant {sparsity:g} percent."
            if 1 < sparsity < 100
            else "a value such as 0.5.",
        )
    return Pattern(sparsity=float(sparsity))


def _groups(pattern: str) -> Pattern:
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", pattern)
    kept, group = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < kept < group:
        raise Problem(
            f'`pattern` must be "kept:group" with 0 < kept < group, got {pattern!r}.',
            why="the first number counts the weights that stay in every group of consecutive inputs.",
            fix=f'"{group}:{kept}" keeps {group} of {kept}.' if 0 < group < kept else '"2:4" keeps two of four.',
        )
    return Pattern(kept=kept, group=group)


@dataclass(frozen=True)
class Sparse:
    """Weights [O, I] that are zero on a mask, and the mask, bool [O, I], True where a weight goes."""

    weight: Float[Tensor, "O I"]
    pruned: Bool[Tensor, "O I"]


def select(scores: Float[Tensor, "O I"], pattern: Pattern, *, scope: Scope = "layer") -> Bool[Tensor, "O I"]:
    """Marks the entries with the lowest scores.

    Args:
        scores: Importance, shape [O, I]; the lowest go first, ties by ascending flat index.
        pattern: What to remove. Columns after the last whole N:M group stay.
        scope: ``"row"`` removes the same number from every row, ``"layer"`` ranks the whole matrix.

    Returns:
        Boolean [O, I], True where a weight is removed.
    """
    if pattern.grouped:
        return _select_groups(scores, pattern)
    if scope == "row":
        return lowest(scores, pattern.quota(scores.shape[1]))
    return lowest(scores.reshape(1, -1), pattern.quota(scores.numel())).reshape(scores.shape)


def _select_groups(scores: Float[Tensor, "O I"], pattern: Pattern) -> Bool[Tensor, "O I"]:
    outputs, inputs = scores.shape
    whole = inputs - inputs % pattern.group
    groups = scores[:, :whole].reshape(-1, pattern.group)
    pruned = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    pruned[:, :whole] = lowest(groups, pattern.group - pattern.kept).reshape(outputs, whole)
    return pruned


def lowest(scores: Float[Tensor, "R C"], count: int) -> Bool[Tensor, "R C"]:
    """Marks exactly ``count`` lowest entries of each row, ties by ascending index, without sorting.

    Args:
        scores: [R, C].
        count: Between 0 and C.
    """
    if count == 0:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    one_row = len(scores) == 1
    threshold = kth_lowest(scores[0], count).reshape(1, 1) if one_row else scores.kthvalue(count, dim=1, keepdim=True).values
    tied = scores == threshold
    marked = scores <= threshold
    if int(marked.sum()) == count * len(scores):
        return marked
    missing = count - (marked & ~tied).sum(dim=1, keepdim=True)
    return marked & (~tied | (tied.cumsum(dim=1) <= missing))


def kth_lowest(values: Float[Tensor, "N"], count: int) -> Float[Tensor, ""]:
    """The value at place ``count`` in ascending order; a sample brackets it, so that only what lies between is ranked."""
    stride = len(values) // SAMPLE
    if stride > 1:
        sample = values[::stride].sort().values
        place, slack = count / len(values) * len(sample), 4 * math.sqrt(len(sample))
        low, high = sample[max(0, int(place - slack))], sample[min(len(sample) - 1, int(place + slack))]
        between = values[(values >= low) & (values <= high)]
        rank = count - int((values < low).sum())
        if 1 <= rank <= len(between):
            return between.kthvalue(rank).values
    return values.kthvalue(count).values


def keep_existing_zeros(scores: Float[Tensor, "O I"], weight: Float[Tensor, "O I"], pattern: Pattern) -> Float[Tensor, "O I"]:
    """Non-negative scores [O, I] with the weights that are zero already first in line; see ``existing_zeros``."""
    return scores.masked_fill(existing_zeros(weight, pattern), -1.0)


def existing_zeros(weight: Float[Tensor, "O I"], pattern: Pattern) -> Bool[Tensor, "O I"]:
    """The weights that are zero already and must go first, so that a sparse model stays sparse.

    Args:
        weight: The weights as given, [O, I].
        pattern: Target; its share must not lie below the sparsity that the weight has.

    Raises:
        Problem: If the weight is sparser than a share that is asked for already.
    """
    zeros = weight == 0
    outputs, inputs = weight.shape
    count, share = int(zeros.sum()), float(zeros.float().mean())
    if not pattern.grouped and share > SPARSE_FROM and count > max(pattern.total(outputs, inputs, scope) for scope in SCOPES):
        raise Problem(
            f"The weight is {share:.2%} zero already, the target is {pattern.share:.2%}.",
            why="pruning never brings removed weights back.",
            fix="ask for a higher sparsity, or leave this layer out with `skip`.",
        )
    return zeros


def lasting_zeros(weight: Tensor) -> Tensor:
    """Where a weight must stay zero, bool [O, I]: at all of its zeros if it is sparse, which starts at ``SPARSE_FROM``; else nowhere."""
    zeros = weight == 0
    return zeros if float(zeros.float().mean()) > SPARSE_FROM else torch.zeros_like(zeros)
