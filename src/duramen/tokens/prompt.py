"""A prompt that gets shorter from layer to layer: what is left of it, and what a block must be told instead of what it was told of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from duramen.problem import Problem
from duramen.tokens.compact import Kept


@dataclass
class Prompt:
    """What is left of a batch of prompts.

    Attributes:
        valid: Which slots hold tokens, bool [B, K].
        kept: What is left of every row.
        asked: Which of that the user wants kept and not counted, bool [K_b] of every row.
        length: How many slots it had at first, T.
        first: In which of those every row began, [B].
        next: The place of the first token after it, [B].
        shortened: Whether something has left.
        attended: Which slots hold tokens in the caches of attention layers, by layer.
        history: What was left after each layer after which some left, as ``kept``.
        padding: ``valid``, or None where all slots hold tokens; found once for all layers up to the next site.
        positions: Where the token of every slot was among those of its row, [B, K]; −1 for padding.
    """

    valid: Bool[Tensor, "B K"]
    kept: list[Kept]
    asked: list[Tensor]
    length: int
    first: Int[Tensor, "B"]
    next: Int[Tensor, "B"]
    shortened: bool = False
    attended: dict[int, Tensor] = field(default_factory=dict)
    history: dict[int, list[Kept]] = field(default_factory=dict)
    padding: Tensor | None = field(init=False)
    positions: Int[Tensor, "B K"] = field(init=False)

    def __post_init__(self) -> None:
        self._note_slots()

    def _note_slots(self) -> None:
        """Finds what all layers up to the next site ask for."""
        self.padding = None if bool(self.valid.all()) else self.valid
        self.positions = self._padded([kept.positions for kept in self.kept], -1)

    @classmethod
    def begin(cls, valid: Bool[Tensor, "B T"], positions: Int[Tensor, "_ T"] | None, protect: Tensor | None) -> Prompt:
        """A prompt of which nothing has left.

        Args:
            valid: Which slots hold tokens.
            positions: The places that the model is told; None for those from 0.
            protect: What the user wants kept, bool [B, T].

        Raises:
            Problem: If a row has padding between its tokens.
        """
        if bool(((valid[:, 1:] != valid[:, :-1]).sum(1) > 1).any()):
            raise Problem(
                "A row of the prompt has padding between its tokens, or on both sides.",
                why="where a token is, is counted from the beginning of its row.",
                fix="an `attention_mask` with padding on one side.",
            )
        asked = torch.zeros_like(valid) if protect is None else protect.to(valid)
        slots = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
        places = slots if positions is None else positions.expand_as(valid)
        return cls(
            valid, [Kept.all_of(int(row.sum()), valid.device) for row in valid], [a[v] for a, v in zip(asked, valid, strict=True)],
            valid.shape[1], valid.int().argmax(1), places.masked_fill(~valid, -1).amax(1) + 1,
        )  # fmt: skip

    def leave(self, layer: int, rows: Sequence[Tensor], kept: list[Kept], asked: list[Tensor]) -> Float[Tensor, "B K D"]:
        """Only these rows, [K_b, D], are left after a layer, padded on the side on which the prompt was."""
        counts = torch.tensor([len(row) for row in rows], device=self.valid.device)
        most, slots = int(counts.max()), torch.arange(int(counts.max()), device=self.valid.device)
        right = not bool(self.valid[:, -1].all())
        self.valid = slots < counts[:, None] if right else slots >= most - counts[:, None]
        self.kept, self.asked, self.shortened = kept, asked, True
        self.history[layer] = kept
        self._note_slots()
        return self._padded(rows, 0)

    def _padded(self, rows: Sequence[Tensor], filler: float) -> Tensor:
        """Rows [K_b, ...] in the slots that hold tokens, [B, K, ...]."""
        found = rows[0].new_full((*self.valid.shape, *rows[0].shape[1:]), filler)
        found[self.valid] = torch.cat(list(rows))
        return found

    def spread(self, hidden: Float[Tensor, "B K D"]) -> Float[Tensor, "B T D"]:
        """Every token back in its first slot; NaN where one has left, so that nobody reads there unnoticed."""
        whole = hidden.new_full((len(hidden), self.length, hidden.shape[-1]), torch.nan)
        for row, kept in enumerate(self.kept):
            whole[row, kept.positions + self.first[row]] = hidden[row, self.valid[row]]
        return whole

    def told(self, arguments: dict[str, Any], *, besides: str, causal: str | None) -> dict[str, Any]:
        """What a block is told of the whole prompt, by name, for what is left of it; the mask of its attention, if it has one, goes by ``causal``."""
        fitted = {name: value if name == besides else self._fit(name, value) for name, value in arguments.items()}
        if causal:
            fitted[causal] = self._causal_mask(arguments.get(causal), arguments[besides].dtype)
        return fitted

    def _fit(self, name: str, value: Any) -> Any:
        """An argument for the whole prompt, [B or 1, T, ...], for what is left; what has no such shape stays."""
        if isinstance(value, tuple):
            return tuple(self._fit(name, each) for each in value)
        if not isinstance(value, Tensor) or value.ndim not in (2, 3) or value.shape[1] != self.length:
            return value
        if name == "attention_mask":
            return self.valid.to(value.dtype)
        rows = torch.arange(len(self.valid), device=value.device)[:, None]
        slots = (self.positions + self.first[:, None]).clamp_min(0)
        return value.expand(len(self.valid), *value.shape[1:])[rows, slots]

    def _causal_mask(self, given: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The mask of an attention layer over what is left, in the form of the one that was given; None where the layer needs none."""
        if given is None and self.padding is None:
            return None
        if given is not None and given.ndim == 2:
            return self.valid.to(given.dtype)
        size = self.valid.shape[1]
        earlier = torch.ones(size, size, dtype=torch.bool, device=self.valid.device).tril()
        allowed = earlier & self.valid[:, None, None, :]
        return allowed if given is not None and given.dtype == torch.bool else _added(allowed, dtype)

    def mask_after(self, layer: int, cached: int, new: int, dtype: torch.dtype) -> Tensor | None:
        """The mask of an attention layer for ``new`` tokens after it, with ``cached`` slots in the cache; None where it needs none."""
        read = self.attended[layer]
        if new == 1 and bool(read.all()):
            return None
        known = torch.ones(len(read), cached + new, dtype=torch.bool, device=read.device)
        known[:, : read.shape[1]] = read
        earlier = torch.ones(new, cached + new, dtype=torch.bool, device=read.device).tril(cached)
        return _added(earlier & known[:, None, None, :], dtype)

    def following(self, new: int) -> Int[Tensor, "B n"]:
        """The places of the next ``new`` tokens, and notes that they came."""
        places = self.next[:, None] + torch.arange(new, device=self.next.device)
        self.next = self.next + new
        return places


def _added(allowed: Bool[Tensor, "..."], dtype: torch.dtype) -> Tensor:
    """What is added to scores so that only the allowed ones count."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, torch.finfo(dtype).min)
