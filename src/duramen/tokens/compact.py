"""Taking tokens out of a sequence: what leaves merges into what stays or is dropped, and the rest keeps its order and its places."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from duramen.tokens.match import Pairs


@dataclass(frozen=True)
class Kept:
    """What is left of one sequence.

    Attributes:
        positions: Where its tokens were at first, rising, [K].
        sizes: How many tokens each stands for, [K].
        representative: For every token of the first sequence, the slot that stands for it now, [T].
    """

    positions: Int[Tensor, "K"]
    sizes: Float[Tensor, "K"]
    representative: Int[Tensor, "T"]

    @classmethod
    def all_of(cls, length: int, device: torch.device | None = None) -> Kept:
        """A sequence of which nothing has left."""
        places = torch.arange(length, device=device)
        return cls(places, torch.ones(length, device=device), places)

    def without(self, pairs: Pairs) -> Kept:
        """After these pairs."""
        stays = staying(len(self.positions), pairs)
        slots = stays.cumsum(0) - 1
        goes_to = torch.arange(len(stays), device=stays.device)
        goes_to[pairs.source] = pairs.target
        sizes = self.sizes.index_add(0, pairs.target, self.sizes[pairs.source])
        return Kept(self.positions[stays], sizes[stays], slots[goes_to[self.representative]])


def staying(length: int, pairs: Pairs) -> Tensor:
    """Which tokens stay, bool [T]."""
    stays = torch.ones(length, dtype=torch.bool, device=pairs.source.device)
    stays[pairs.source] = False
    return stays


def reduce(
    values: Float[Tensor, "T D"], pairs: Pairs, *, prune_share: float = 0.0, sizes: Float[Tensor, "T"] | None = None
) -> Float[Tensor, "K D"]:
    """What is left of one stream.

    Args:
        values: The stream.
        pairs: What leaves.
        prune_share: q, the share of the pairs, the most similar ones, whose tokens are dropped; those of the others merge.
        sizes: How many tokens each stands for, by which means are weighted; None for equal weights.

    Returns:
        The tokens that stay; each that took others in is the mean of itself and all of them, the others are as they were.
    """
    merge = slice(round(prune_share * len(pairs.source)), None)
    source, target = pairs.source[merge], pairs.target[merge]
    weights = torch.ones(len(values), device=values.device) if sizes is None else sizes.float()
    taken = torch.unique(target)
    sums = (values.float() * weights[:, None]).index_add(0, target, values[source].float() * weights[source, None])
    counts = weights.index_add(0, target, weights[source])
    merged = values.index_copy(0, taken, (sums[taken] / counts[taken, None]).to(values.dtype))
    return merged[staying(len(values), pairs)]
