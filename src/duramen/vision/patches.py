"""Which patches of an image leave a network, and what is known of those that are left.

"Exploring Token Pruning in Vision State Space Models" (arXiv 2409.18962): after some layers the patches of the least importance leave, and the others keep their places on every
path (``duramen.ssm.fold``). Importance is what the scans of all paths made of a patch, brought back to the order of patches; the class token is not ranked and keeps its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from duramen.finite import all_finite
from duramen.problem import Exit, Problem
from duramen.registry import Settings as MethodSettings
from duramen.ssm.fold import GapStep
from duramen.ssm.mixer import Seen
from duramen.tokens.compact import Kept, reduce
from duramen.tokens.match import match
from duramen.tokens.schedule import kept_count
from duramen.tokens.score import Score, importance

PatchScore = Score | Literal["attention"]
APART = 64
"""How far from each other, and from the end of a sequence, the places of padding are: further than any filter reaches."""


@dataclass(frozen=True)
class Patches:
    """What is left of a batch of sequences.

    Attributes:
        positions: Where each token was at first, rising, [B, K]; padding stands behind the end.
        valid: Which are there, [B, K]; None for all.
        sizes: How many tokens each stands for, [B, K].
        representative: For every token of the first sequence, the slot that stands for it, [B, T].
        ranks: The step of every place on the way by which nearness is meant, [T].
        extra: Which places hold no patch, as that of a class token, bool [T].
    """

    positions: Int[Tensor, "B K"]
    valid: Bool[Tensor, "B K"] | None
    sizes: Float[Tensor, "B K"]
    representative: Int[Tensor, "B T"]
    ranks: Int[Tensor, "T"]
    extra: Bool[Tensor, "T"]

    @classmethod
    def all_of(cls, batch: int, ranks: Int[Tensor, "T"], extra: Sequence[int] = ()) -> Patches:
        """Sequences of which nothing has left, with no patch at the places ``extra``."""
        places = torch.arange(len(ranks), device=ranks.device).expand(batch, -1)
        outside = torch.zeros_like(ranks, dtype=torch.bool)
        outside[list(extra)] = True
        return cls(places, None, torch.ones(places.shape, device=ranks.device), places, ranks, outside)

    @property
    def whole(self) -> bool:
        """Whether nothing has left."""
        return self.valid is None and self.positions.shape[1] == len(self.ranks)

    @property
    def counts(self) -> Int[Tensor, "B"]:
        """How many tokens there are in each."""
        there = torch.ones_like(self.positions) if self.valid is None else self.valid
        return there.sum(1)

    @property
    def of_grid(self) -> Int[Tensor, "B P"]:
        """The slots that stand for the patches of the grid, without the class token."""
        return self.representative[:, ~self.extra]

    @property
    def is_extra(self) -> Bool[Tensor, "B K"]:
        """Which tokens are no patches."""
        inside = self.positions < len(self.ranks)
        return inside & self.extra[torch.where(inside, self.positions, 0)]

    def after(self, slots: Int[Tensor, "B K"], valid: Bool[Tensor, "B K"] | None) -> Patches:
        """What is left if only these slots stay, rising; those that are not ``valid`` are padding."""
        positions, sizes = (each.gather(1, slots) for each in (self.positions, self.sizes))
        if valid is not None:
            behind = len(self.ranks) + APART * torch.arange(1, slots.shape[1] + 1, device=slots.device)
            positions, sizes = torch.where(valid, positions, behind), torch.where(valid, sizes, 0.0)
        return replace(self, positions=positions, valid=valid, sizes=sizes, representative=self._nearest(positions, valid))

    def _nearest(self, positions: Tensor, valid: Tensor | None) -> Int[Tensor, "B T"]:
        """For every place the slot that is nearest on the way; what is no patch stands for itself alone."""
        there = positions.clamp_max(len(self.ranks) - 1)
        apart = (self.ranks[None, :, None] - self.ranks[there][:, None]).abs()
        other = self.extra[None, :, None] != self.extra[there][:, None]
        if valid is not None:
            other = other | ~valid[:, None]
        return apart.masked_fill(other, torch.iinfo(apart.dtype).max).argmin(-1)


class PatchReduction(MethodSettings):
    """Which patches leave, and where."""

    kind: Literal["top", "random", "merge"] = "top"
    """`top` drops the least important patches, `random` any; `merge` joins every second patch to the one of the others that it is most like (ToMe's way, in order)."""
    score: PatchScore = "write"
    """How important a patch is: by what it writes into the scans, or in a transformer into the class token (`write`); by its steps alone (`delta`) or what comes out of the scans (`clip`, the published one, `l1`, `l2`, `sum`); in a transformer by how much the class token looks at it (`attention`)."""
    sites: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Layers after which patches leave, from 0."""
    keep: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.8,)
    """What share of the patches that are there stays at each site; one number for all of them."""
    gap_step: GapStep = "bias"
    """By how much the state decays where a patch has left; `hold`: not at all."""
    aligned: bool = True
    """Whether a convolution sees zeros where patches have left, instead of the patches beyond."""
    mass: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Where given, every image keeps as many patches as have this share of its importance, instead of `keep`."""

    @model_validator(mode="after")
    def _merges_as_many(self) -> PatchReduction:
        if self.kind == "merge" and (self.mass is not None or any(share < 0.5 for share in self.keep)):
            raise ValueError("`kind: merge` joins at most half of the patches at a site, and as many in every image")
        return self

    @field_validator("sites")
    @classmethod
    def _in_order(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError("`sites` are layers in rising order, each once")
        return value

    def by_layer(self, layers: int) -> dict[int, float]:
        """What share stays after which of so many layers.

        Raises:
            Problem: If a site is not there or would save nothing, or shares and sites do not fit.
        """
        if self.sites and self.sites[-1] >= layers - 1:
            raise Problem(
                f"Patches cannot leave after layer {self.sites[-1]} of {layers}.",
                why="nothing comes after it that could be saved.",
                fix=f"`sites` from 0 to {layers - 2}.",
            )
        if len(self.keep) not in (1, len(self.sites)):
            raise Problem(
                f"{len(self.keep)} shares do not fit {len(self.sites)} sites.",
                why="each site has one.",
                fix="one `keep` for all, or as many.",
            )
        shares = self.keep * len(self.sites) if len(self.keep) == 1 else self.keep
        return dict(zip(self.sites, shares, strict=True))

    @torch.no_grad()
    def scores(self, seen: Sequence[Seen], layer: int) -> Float[Tensor, "B K"]:
        """Importance of every token, from what each path's scan made of it, in the order of tokens.

        Raises:
            Problem: If the score is one of transformers, or not finite.
        """
        if self.score == "attention":
            raise Problem("A scan has no attention.", why="`score: attention` is for transformers.", fix="`score: write`.")
        if self.score in ("delta", "write"):
            found = torch.stack([importance(self.score, **each._asdict()) for each in seen]).sum(0)
        else:
            outputs = torch.stack([each.outputs.float() for each in seen]).sum(0)
            found = importance(self.score, **seen[0]._replace(outputs=outputs)._asdict())
        check_scores(found, layer)
        return found

    def leave(
        self, hidden: Float[Tensor, "B K D"], patches: Patches, seen: Sequence[Seen], keep: float, layer: int
    ) -> tuple[Float[Tensor, "B k D"], Patches]:
        """What is left of a state-space model's stream after a site."""
        if self.kind == "merge":
            return self.merged(hidden, hidden, patches, keep)
        scores = random_scores(hidden, layer) if self.kind == "random" else self.scores(seen, layer)
        return self.staying(hidden, scores, patches, keep)

    def staying(
        self, hidden: Float[Tensor, "B K D"], scores: Float[Tensor, "B K"], patches: Patches, keep: float
    ) -> tuple[Float[Tensor, "B k D"], Patches]:
        """The patches of the largest scores, and what is no patch."""
        slots, valid = self._staying(scores, patches, keep)
        kept = hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[2]))
        return kept if valid is None else kept * valid[..., None], patches.after(slots, valid)

    def _staying(
        self, scores: Float[Tensor, "B K"], patches: Patches, keep: float
    ) -> tuple[Int[Tensor, "B k"], Bool[Tensor, "B k"] | None]:
        """The slots that stay, rising, and which of them are there; of equal scores the earlier stays."""
        ranked = scores.clone()
        if patches.valid is not None:
            ranked[~patches.valid] = -torch.inf
        ranked[patches.is_extra] = torch.inf
        order = ranked.argsort(dim=1, descending=True, stable=True)
        counts = self._counts(ranked, order, keep)
        most = int(counts.max())
        there = torch.arange(most, device=scores.device) < counts[:, None]
        slots = torch.where(there, order[:, :most], scores.shape[1])
        slots, sorting = slots.sort(1)
        valid = there.gather(1, sorting)
        return slots.clamp_max(scores.shape[1] - 1), None if bool(valid.all()) else valid

    def _counts(self, ranked: Float[Tensor, "B K"], order: Int[Tensor, "B K"], keep: float) -> Int[Tensor, "B"]:
        """How many tokens stay in every image, the class token among them."""
        patches = ranked.isfinite().sum(1)
        extra = (ranked == torch.inf).sum(1)
        if self.mass is None:
            return torch.tensor([kept_count(int(count), keep) for count in patches], device=ranked.device) + extra
        sorted_scores = ranked.gather(1, order)
        parts = torch.where(sorted_scores.isfinite(), sorted_scores, 0.0).clamp_min(0).cumsum(1)
        below = (parts < self.mass * parts[:, -1:]) & sorted_scores.isfinite()
        return torch.minimum(below.sum(1) + 1, patches) + extra

    def merged(
        self, hidden: Float[Tensor, "B K D"], features: Float[Tensor, "B K d"], patches: Patches, keep: float
    ) -> tuple[Float[Tensor, "B k D"], Patches]:
        """Every second patch looks for the one of the others that it is most like by its features, and the pairs that are nearest become one; the mean is weighted by sizes."""
        rows, kept = [], []
        for row, places in enumerate(patches.positions):
            extra = patches.is_extra[row]
            count = int((~extra).sum())
            alternate = (torch.arange(len(places), device=places.device) % 2).float()
            leaving = count - kept_count(count, keep)
            pairs = match(alternate, features[row].detach(), leaving, protected=extra, into_protected=False)
            before = Kept(places, patches.sizes[row], patches.representative[row])
            rows.append(reduce(hidden[row], pairs, sizes=before.sizes))
            kept.append(before.without(pairs))
        return torch.stack(rows), replace(
            patches,
            positions=torch.stack([each.positions for each in kept]),
            sizes=torch.stack([each.sizes for each in kept]),
            representative=torch.stack([each.representative for each in kept]),
        )


def random_scores(hidden: Float[Tensor, "B K D"], layer: int) -> Float[Tensor, "B K"]:
    """For comparison; the same for a layer each time."""
    return torch.rand(hidden.shape[:2], generator=torch.Generator().manual_seed(layer)).to(hidden.device)


def patches_across(image: int, patch: int) -> int:
    """Patches in a row of an image of so many pixels.

    Raises:
        Problem: If they do not fill it.
    """
    if image % patch:
        near = [each * patch for each in (image // patch, image // patch + 1) if each]
        raise Problem(
            f"Patches of {patch} pixels do not fill an image of {image}.",
            why="every patch is whole.",
            fix=f"a size of {' or '.join(map(str, near))} pixels, or other patches.",
        )
    return image // patch


def check_scores(scores: Tensor, layer: int) -> None:
    """Stops on importance that is not finite."""
    if not all_finite(scores):
        raise Problem(
            f"A patch's importance after layer {layer} is not finite.",
            why="that layer overflowed, or the model's weights are damaged.",
            fix="run in float32, and look for damaged weights.",
            code=Exit.CHECK_FAILED,
        )
