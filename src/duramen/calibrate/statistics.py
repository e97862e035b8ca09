"""What a layer's inputs looked like: streaming second moments, exact counts, train and held-out apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DOUBLE_UP_TO = 8192
"""Widest Gram that is accumulated in float64; each batch's product is float32."""
BLOCK = 384
"""Rows of a Gram that are computed at a time, from the diagonal to the right."""


def gram(rows: Tensor) -> Tensor:
    """rowsᵀ·rows, [N, I] -> [I, I]: what lies on and above the diagonal is computed, the rest mirrored."""
    inputs = rows.shape[1]
    product = rows.new_empty(inputs, inputs)
    for start in range(0, inputs, BLOCK):
        part = rows[:, start : start + BLOCK].T @ rows[:, start:]
        product[start : start + BLOCK, start:] = part
        product[start:, start : start + BLOCK] = part.T
    return product


@dataclass
class Moments:
    """Sums over some tokens: how many, Σ x [I], Σ x xᵀ [I, I]."""

    count: int
    first: Tensor
    second: Tensor

    def add(self, rows: Tensor, product: Tensor) -> None:
        """Adds rows [N, I] with their product rowsᵀ·rows."""
        self.count += len(rows)
        self.first += rows.sum(0, dtype=self.first.dtype)
        self.second += product

    @property
    def mean(self) -> Tensor:
        """[I]."""
        return self.first / max(self.count, 1)

    def about(self, mean: Tensor) -> Tensor:
        """Σ (x − mean)(x − mean)ᵀ, [I, I], for any ``mean`` [I]."""
        shift = torch.outer(self.first - 0.5 * self.count * mean, mean)
        return self.second - shift - shift.T

    def without(self, part: Moments) -> Moments:
        """The sums over the tokens that are not in ``part``."""
        return Moments(self.count - part.count, self.first - part.first, self.second - part.second)


class Statistics:
    """Sums over the calibration tokens that one or more layers read; additive, so ranks can add theirs.

    Attributes:
        total: Over all tokens x̂ that the edited model feeds the layer.
        held_out: The part of it from held-out sequences; only if asked for.
        dense: Over all tokens x that the dense model feeds it; only if asked for.
        cross: Σ x x̂ᵀ, [I, I]; only with ``dense``.
        held_out_cross: The part from held-out sequences of Σ x and Σ x x̂ᵀ; only if asked for.

    Args:
        inputs: Of the layer, I.
        held_out: Whether some sequences are kept for validation.
        dense_inputs: Of the layer in the dense model, which may be wider; 0 for no statistics of it.
        held_out_cross: Whether the cross sums of held-out sequences are kept apart as well.
        device: Where the sums are.
    """

    def __init__(
        self, inputs: int, *, held_out: bool, dense_inputs: int = 0, held_out_cross: bool = False, device: torch.device
    ) -> None:
        kind = torch.float64 if max(inputs, dense_inputs) <= DOUBLE_UP_TO else torch.float32

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        def moments(width: int) -> Moments:
            return Moments(0, zeros(width), zeros(width, width))

        self.total = moments(inputs)
        self.held_out = moments(inputs) if held_out else None
        self.dense = moments(dense_inputs) if dense_inputs else None
        self.cross = zeros(dense_inputs, inputs) if dense_inputs else None
        self.held_out_cross = Moments(0, zeros(dense_inputs), zeros(dense_inputs, inputs)) if held_out_cross else None

    def update(self, edited: Tensor, *, dense: Tensor | None = None, held_out: bool = False) -> None:
        """Adds one batch of inputs.

        Args:
            edited: What the edited model feeds the layer, [..., I].
            dense: What the dense model feeds it, [..., I]; needed if its statistics were asked for.
            held_out: Whether this batch is kept for validation.
        """
        rows = edited.flatten(0, -2).float()
        product = gram(rows)
        self.total.add(rows, product)
        if held_out and self.held_out is not None:
            self.held_out.add(rows, product)
        if self.cross is not None and self.dense is not None:
            assert dense is not None
            source = dense.flatten(0, -2).float()
            product = source.T @ rows
            self.cross += product
            if held_out and self.held_out_cross is not None:
                self.held_out_cross.add(source, product)
            self.dense.add(source, gram(source))

    @property
    def train(self) -> Moments:
        """The tokens that are not held out."""
        return self.total if self.held_out is None else self.total.without(self.held_out)

    @property
    def tokens(self) -> int:
        """Tokens seen, in all."""
        return self.total.count
