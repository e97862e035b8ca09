"""What the loss or an output would lose with a unit: Taylor scores from gradients, and scores from activations.

Taylor scores after "LLM-Pruner" (arXiv 2305.11627): removing the weights w of a slice changes the loss by about −g·w + ½ wᵀHw. With the
diagonal Fisher matrix H ≈ T·q, where q is the mean of squared gradients of losses that are means over T tokens, the *salience* of a
weight is φ = g·w − ½ T q w². The factor T is missing in public code, which so drops the second term. *Coarse* (vector-wise): |Σφ| over a
row or column, *fine* (element-wise): Σ|φ|; both summed over the slices of a unit. The reading of per-sequence scores is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from duramen.calibrate import ranks
from duramen.families.table import Member
from duramen.shrink.groups import Units

Order = Literal["first", "second", "mix"]
Coarse = Literal["per_sequence", "batch", "mask_fisher"]


def slice_sums(salience: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Signed and absolute sums over each slice along ``axis``: [n, m] or [m, n] -> ([n], [n]); a bias [n] stays as it is."""
    rows = salience.movedim(axis, 0).flatten(1) if salience.ndim > 1 else salience[:, None]
    return rows.sum(1), rows.abs().sum(1)


def wanda_sp(weight: Float[Tensor, "O I"], gram_diagonal: Float[Tensor, "I"]) -> Float[Tensor, "I"]:
    """Mean over outputs of |W|·‖x‖ per input column (Wanda's score, structured)."""
    return weight.abs().mean(0) * gram_diagonal.sqrt()


def flap(weight: Float[Tensor, "O I"], variance: Float[Tensor, "I"]) -> Float[Tensor, "I"]:
    """Fluctuation of each input column, Var(x)·‖W_:,j‖² (FLAP, arXiv 2312.11983, WIFV)."""
    return variance * weight.square().sum(0)


@dataclass(frozen=True)
class Estimates:
    """Taylor scores of the units of one kind in one block.

    Attributes:
        coarse: One estimate per unit, [U].
        fine: The other, [U].
        coarse_table: Estimates from every sequence alone, [N, U].
        fine_table: The same, [N, U].
    """

    coarse: Float[Tensor, "U"]
    fine: Float[Tensor, "U"]
    coarse_table: Float[Tensor, "N U"]
    fine_table: Float[Tensor, "N U"]


class Taylor:
    """Sums salience while gradients stream by; an observer of ``walk_back``.

    Args:
        units: Of all blocks.
        sequences: How many there are, N.
        tokens: Target tokens of each, T; all sequences are equally long.
        order: Which terms of φ the fine score has.
        coarse: Where the coarse score comes from: the mean over sequences of first-order scores, the gradient of the whole batch (as in
            LLM-Pruner, with the terms of ``order``), or the squared derivative to a factor on the unit's activation.
        give: Called with the scores of every kind of a block as soon as they are known.
    """

    def __init__(
        self,
        units: list[Units],
        sequences: int,
        tokens: int,
        *,
        order: Order,
        coarse: Coarse,
        give: Callable[[Units, Estimates], None],
    ) -> None:
        self.units, self.sequences, self.tokens = units, sequences, tokens
        self.order, self.coarse, self.give = order, coarse, give
        self._tables: dict[tuple[str, str], Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}

    def _here(self, block: int) -> list[Units]:
        return [units for units in self.units if units.block == block]

    def paths(self, block: int) -> list[str]:
        """All tensors that belong to units."""
        return sorted({member.path for units in self._here(block) for member in units.members})

    def see(self, block: int, path: str, weight: Tensor, gradient: Tensor, sequence: int) -> None:
        """Adds one sequence's gradient of one tensor."""
        if self._needs_sums:
            self._weights[path] = weight
            _accumulate(self._sums, path, gradient.float())
            if self.order != "first":
                _accumulate(self._squares, path, gradient.float().square())
        product = gradient.to(torch.float32, copy=True).mul_(weight)
        members = [(units, member) for units in self._here(block) for member in units.members if member.path == path]
        for units, member in members:
            signed, absolute = (_by_unit(units, member, sums) for sums in slice_sums(product, member.axis))
            self._add(units, "coarse", sequence, signed.abs().sum(1))
            self._add(units, "first", sequence, absolute.sum(1))
            if member.reads:
                self._add(units, "factor", sequence, signed.sum(1))
        product.square_()
        for units, member in members:
            squares = _by_unit(units, member, slice_sums(product, member.axis)[0])
            self._add(units, "second", sequence, 0.5 * self.tokens * squares.sum(1))

    @property
    def _needs_sums(self) -> bool:
        """Whether a score needs the gradient of all sequences together, weight by weight."""
        return self.order != "second" or self.coarse == "batch"

    def _add(self, units: Units, table: str, sequence: int, values: Tensor) -> None:
        key = (units.kind, table)
        if key not in self._tables:
            self._tables[key] = torch.zeros(self.sequences, units.count)
        self._tables[key][sequence] += values.cpu()

    def finish(self, block: int) -> None:
        """Gives the scores of a block, and forgets its sums."""
        for table in self._tables.values():
            ranks.add(table)
        for table in (*self._sums.values(), *self._squares.values()):
            ranks.add(table)
        for units in self._here(block):
            self.give(units, self._scores(units))
        for kept in (self._tables, self._weights, self._sums, self._squares):
            kept.clear()

    def _scores(self, units: Units) -> Estimates:
        table = {name: values for (kind, name), values in self._tables.items() if kind == units.kind}
        fine_table = table["second"] if self.order == "second" else table["first"]
        fine = fine_table.mean(0) if self.order == "second" else self._batch(units, self.order)[1]
        fisher = 0.5 * self.tokens * table["factor"].square()
        coarse_table = fisher if self.coarse == "mask_fisher" else table["coarse"]
        coarse = self._batch(units, self.order)[0] if self.coarse == "batch" else coarse_table.mean(0)
        return Estimates(coarse, fine, coarse_table, fine_table)

    def _salience(self, path: str, order: Order) -> Tensor:
        """φ of every weight of a tensor from all sequences, with the terms of ``order``."""
        first = self._weights[path] * self._sums[path] / self.sequences
        if order == "first":
            return first
        second = 0.5 * self.tokens * self._weights[path].float().square() * self._squares[path] / self.sequences
        return first - second if order == "mix" else -second

    def _batch(self, units: Units, order: Order) -> tuple[Tensor, Tensor]:
        """Coarse and fine scores from the gradients of all sequences together, each [U]."""
        coarse, fine = torch.zeros(units.count), torch.zeros(units.count)
        for member in units.members:
            salience = self._salience(member.path, order)
            signed, absolute = (_by_unit(units, member, values) for values in slice_sums(salience, member.axis))
            coarse += signed.abs().sum(1).cpu()
            fine += absolute.sum(1).cpu()
        return coarse, fine


def _accumulate(sums: dict[str, Tensor], path: str, values: Tensor) -> None:
    if path in sums:
        sums[path] += values
    else:
        sums[path] = values.clone()


def _by_unit(units: Units, member: Member, values: Tensor) -> Tensor:
    """Entries of an axis, [n] -> [U, entries of one unit]."""
    return values[member.indices(units.sizes, range(units.count)).to(values.device)].reshape(units.count, -1)
