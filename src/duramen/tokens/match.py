"""Which tokens of one sequence leave, and the token that each is most like: importance-split bipartite matching.

Equations 6 and 7 of arXiv 2410.14725: the less important half looks for its nearest by cosine among the others, and the pairs that are nearest leave. What
the paper leaves open is ours: ties go to the earlier token; protected tokens neither leave nor, unless it is wished, take others in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ROWS = 1024
"""Tokens whose similarities to all others are in memory together."""


@dataclass(frozen=True)
class Pairs:
    """Tokens that leave and what they are most like, the most similar pair first; [r] each."""

    source: Int[Tensor, "r"]
    target: Int[Tensor, "r"]
    similarity: Float[Tensor, "r"]


def match(
    scores: Float[Tensor, "T"],
    features: Float[Tensor, "T D"],
    count: int,
    *,
    protected: Bool[Tensor, "T"] | None = None,
    valid: Bool[Tensor, "T"] | None = None,
    forward: bool = False,
    window: int | None = None,
    into_protected: bool = True,
) -> Pairs:
    """Finds the pairs of one sequence.

    Args:
        scores: Importance.
        features: What similarity is taken of.
        count: How many tokens are to leave; at most half of those that may do.
        protected: Tokens that stay.
        valid: Tokens that there are; the others are padding.
        forward: Whether a token may merge only into a later one, so that no token learns of its future.
        window: How far apart the two may be; None for any distance.
        into_protected: Whether protected tokens take others in.

    Returns:
        As many pairs, or fewer where some token has nobody to merge into.
    """
    there = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    kept = torch.zeros_like(there) if protected is None else protected
    may_leave = (there & ~kept).nonzero().flatten()
    least = scores[may_leave].argsort(stable=True)[: len(may_leave) // 2]
    a = may_leave[least].sort().values
    takes = there.clone()
    takes[a] = False
    if not into_protected:
        takes &= ~kept
    b = takes.nonzero().flatten()
    if not (len(a) and len(b) and count):
        none = a[:0]
        return Pairs(none, none, scores[:0].float())
    found = [_nearest(features, part, b, forward, window) for part in torch.split(a, ROWS)]
    similarity, target = (torch.cat(each) for each in zip(*found, strict=True))
    order = similarity.argsort(descending=True, stable=True)[:count]
    order = order[similarity[order] > -torch.inf]
    return Pairs(a[order], target[order], similarity[order])


def _nearest(features: Tensor, a: Tensor, b: Tensor, forward: bool, window: int | None) -> tuple[Tensor, Tensor]:
    """The greatest cosine of each of ``a`` with those of ``b`` that it may merge into, and which that is; both rise, and what is too far off is not looked at."""
    if window is not None:
        first = min(int(torch.searchsorted(b, a[0] - window)), len(b) - 1)
        end = int(torch.searchsorted(b, a[-1] + window, right=True))
        b = b[first : max(end, first + 1)]
    one, other = (torch.nn.functional.normalize(features[each].float(), dim=-1) for each in (a, b))
    cosines, apart = one @ other.T, b - a[:, None]
    if forward:
        cosines = cosines.masked_fill(apart < 0, -torch.inf)
    if window is not None:
        cosines = cosines.masked_fill(apart.abs() > window, -torch.inf)
    best = cosines.max(1)
    return best.values, b[best.indices]
