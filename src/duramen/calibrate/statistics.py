"""What a layer's inputs looked like: streaming second moments, exact counts, train and held-out apart."""

from __future__ import annotations

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


class Statistics:
    """Sums over the calibration tokens that one or more layers read; additive, so ranks can add theirs.

    Attributes:
        tokens: Tokens seen, in all and held out.
        total: Σ x̂ x̂ᵀ over all tokens, [I, I].
        held_out: The part of it from held-out sequences, [I, I].
        cross: Σ x x̂ᵀ, dense inputs by edited inputs, [I, I]; only if asked for.
        dense: Σ x xᵀ of the dense inputs, [I, I]; only with ``cross``.
    """

    def __init__(self, inputs: int, *, held_out: bool, cross: bool, device: torch.device) -> None:
        kind = torch.float64 if inputs <= DOUBLE_UP_TO else torch.float32

        def zeros() -> Tensor:
            return torch.zeros(inputs, inputs, dtype=kind, device=device)

        self.tokens = self.held_out_tokens = 0
        self.total = zeros()
        self.held_out = zeros() if held_out else None
        self.cross = zeros() if cross else None
        self.dense = zeros() if cross else None

    def update(self, edited: Tensor, *, dense: Tensor | None = None, held_out: bool = False) -> None:
        """Adds one batch of inputs.

        Args:
            edited: What the edited model feeds the layer, [..., I].
            dense: What the dense model feeds it, same shape; needed if ``cross`` was asked for.
            held_out: Whether this batch is kept for validation.
        """
        rows = edited.flatten(0, -2).float()
        product = gram(rows)
        self.total += product
        self.tokens += len(rows)
        if held_out and self.held_out is not None:
            self.held_out += product
            self.held_out_tokens += len(rows)
        if self.cross is not None and self.dense is not None:
            assert dense is not None
            source = dense.flatten(0, -2).float()
            self.cross += source.T @ rows
            self.dense += gram(source)

    @property
    def train(self) -> Tensor:
        """Σ x̂ x̂ᵀ over the tokens that are not held out, [I, I]."""
        return self.total if self.held_out is None else self.total - self.held_out
