"""Token reduction inside a state-space language model: after some layers some tokens of the prompt leave, and all later layers work on fewer.

Unified Token Reduction by token importance Classification ("Rethinking Token Reduction for State Space Models", arXiv 2410.14725), with what its text leaves open
decided as in ``match`` and ``compact``. Both branches of a block, what it adds (Y) and what it adds to (X), lose the same tokens: half of the pairs of Y
are dropped and half merge, all of X merge. Each layer's state is built from the tokens that reach it, and generation goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from duramen.override import override
from duramen.problem import Exit, Problem
from duramen.registry import Settings as MethodSettings
from duramen.ssm.fold import GapStep
from duramen.ssm.mixer import ExactScans, Passage, find_mixers
from duramen.tokens.compact import Kept, reduce, staying
from duramen.tokens.match import Pairs, match
from duramen.tokens.schedule import kept_count, published_sites, solve_keep
from duramen.tokens.score import Score, importance

Kind = Literal["utrc", "tome", "prune", "random", "truncate"]


class Reduction(MethodSettings):
    """What leaves, and where."""

    kind: Kind = "utrc"
    """`utrc` matches the less important half with the others, `tome` every second token with the others, and merges; `prune` drops the least important, `random` any, `truncate` the oldest."""
    score: Score = "write"
    """How important a token is: by what it writes (`write`), its step alone (`delta`), or its output (`clip`, the published one, `l1`, `l2`, `sum`)."""
    cut: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """How many fewer tokens the mean layer sees."""
    sites: tuple[int, ...] = ()
    """Layers after which tokens leave, from 0; empty for the published ones."""
    prune_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """q: which share of the pairs is dropped from what blocks add, instead of merged; the most similar ones."""
    residual: Literal["merge", "prune"] = "merge"
    """Whether the tokens of the stream that blocks add to merge or are dropped."""
    merge_forward: bool = True
    """Whether tokens merge only into later ones, so that none learns of its future."""
    sizes: bool = True
    """Whether a token that stands for several counts as many in a mean."""
    window: Annotated[int, Field(ge=1)] | None = 2048
    """How far apart tokens that merge may be."""
    first: Annotated[int, Field(ge=0)] = 1
    """Tokens at the beginning that stay."""
    last: Annotated[int, Field(ge=1)] = 4
    """Tokens at the end that stay; the last one writes the first new token, and a convolution sees four."""
    gap_step: GapStep = "hold"
    """What a removed step decays by in later layers: nothing (`hold`), what a zero input would (`bias`), or as its neighbours do."""
    aligned: bool = False
    """Whether convolutions see zeros where tokens were removed, instead of the next ones."""

    @property
    def shares(self) -> tuple[float, float]:
        """Which share of the pairs is dropped from what blocks add, and from the stream that they add to."""
        if self.kind == "utrc":
            return self.prune_share, float(self.residual == "prune")
        return (0.0, 0.0) if self.kind == "tome" else (1.0, 1.0)


class Reduced:
    """A state-space model that takes tokens out of every prompt, until ``remove`` or the end of a ``with``.

    A prompt is what comes in with more than one token and nothing cached; everything else passes as it is.

    Args:
        network: A transformers model all of whose blocks are state-space layers.
        reduction: What leaves, and where.

    Attributes:
        protect: Further tokens of the next prompt that stay and do not count for what is to leave, bool [B, T]; set by the user.
        kept: What was left of every row of the last prompt.
        valid: Which slots of its logits belong to tokens, bool [B, K].

    Raises:
        Problem: If the model has other layers, or the cut is impossible at these sites.
    """

    def __init__(self, network: nn.Module, reduction: Reduction | None = None) -> None:
        self.reduction = reduction or Reduction()
        self.protect: Tensor | None = None
        self.kept: list[Kept] = []
        self.valid: Tensor | None = None
        names = list(find_mixers(network))
        layers = int(getattr(network.config, "num_hidden_layers", 0))
        if len(names) != layers:
            raise Problem(
                f"{type(network).__name__} has {layers} layers, and {len(names)} of them are state-space layers that can be shortened.",
                why="attention layers would need their own masks and places.",
                fix="a model of the families mamba, mamba2 or falcon_mamba.",
                code=Exit.INCOMPATIBLE,
            )
        self.sites = list(self.reduction.sites) or published_sites(layers)
        self.keep = solve_keep(layers, self.sites, self.reduction.cut)
        gap_step, aligned = self.reduction.gap_step, self.reduction.aligned
        self._passages = [Passage(gap_step=gap_step, aligned=aligned, watch=layer in self.sites) for layer in range(layers)]
        self._scans = ExactScans(network, dict(zip(names, self._passages, strict=True)))
        blocks = [network.get_submodule(name.rpartition(".")[0]) for name in names]
        self._undo = [override(block, partial(self._run, layer, block.forward)) for layer, block in enumerate(blocks)]

    def remove(self) -> None:
        """Gives the model its own way back."""
        while self._undo:
            self._undo.pop()()
        self._scans.remove()

    def __enter__(self) -> Reduced:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def positions(self) -> Int[Tensor, "B K"]:
        """Where the token of every slot was among those of its row; −1 for padding."""
        assert self.valid is not None
        return _padded([kept.positions for kept in self.kept], self.valid, -1)

    def _run(self, layer: int, forward: Callable[..., Tensor], hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One block, and what leaves after it."""
        if layer == 0:
            self._begin(hidden, kwargs.get("attention_mask"), kwargs.get("cache"))
        passage = self._passages[layer]
        passage.valid, passage.places = (self._mask, self._places) if self._reading else (None, None)
        out = forward(hidden, *args, **kwargs)
        return self._shorten(hidden, out, passage) if self._reading and layer in self.sites else out

    def _begin(self, hidden: Tensor, mask: Tensor | None, cache: Any) -> None:
        """Notes which tokens a new prompt has."""
        batch, length, _ = hidden.shape
        self._reading = length > 1 and (cache is None or cache.get_recurrent_state(0) is None)
        if not self._reading:
            return
        fits = mask is not None and mask.ndim == 2 and mask.shape[1] == length
        valid = mask.bool() if mask is not None and fits else torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
        self.valid, self._right = valid, not bool(valid[:, -1].all())
        self.kept = [Kept.all_of(int(row.sum()), hidden.device) for row in valid]
        asked = torch.zeros_like(valid) if self.protect is None else self.protect.to(valid)
        self._asked = [asked[row][valid[row]] for row in range(batch)]
        self.protect = None
        self._places: Tensor | None = None
        self._note_padding()

    def _note_padding(self) -> None:
        """What mixers are told of padding: nothing where there is none."""
        assert self.valid is not None
        self._mask = None if bool(self.valid.all()) else self.valid

    def _shorten(self, hidden: Tensor, out: Tensor, passage: Passage) -> Tensor:
        """What is left after a site, [B, K, D] -> [B, K', D]."""
        assert self.valid is not None
        assert passage.seen is not None
        scores, passage.seen = importance(self.reduction.score, **passage.seen._asdict()), None
        rows = []
        for row, there in enumerate(self.valid):
            added = (out[row] - hidden[row])[there]
            rows.append(self._shorten_row(row, hidden[row][there], added, scores[row][there]))
        counts = torch.tensor([len(each) for each in rows], device=hidden.device)
        slots = torch.arange(int(counts.max()), device=hidden.device)
        self.valid = slots < counts[:, None] if self._right else slots >= counts.max() - counts[:, None]
        self._places = self.positions
        self._note_padding()
        return _padded(rows, self.valid, 0)

    def _shorten_row(self, row: int, stream: Tensor, added: Tensor, scores: Tensor) -> Tensor:
        """What is left of one row, [K, D]."""
        chosen, kept, asked = self.reduction, self.kept[row], self._asked[row]
        protected = asked.clone()
        protected[: chosen.first] = True
        protected[(~asked).nonzero().flatten()[-chosen.last :]] = True
        count = int((~asked).sum())
        pairs = self._leaving(scores, added, count - kept_count(count, self.keep), protected, ~asked)
        sizes = kept.sizes if chosen.sizes else None
        left = [
            reduce(values, pairs, prune_share=share, sizes=sizes)
            for values, share in zip((added, stream), chosen.shares, strict=True)
        ]
        stays = staying(len(stream), pairs)
        self.kept[row], self._asked[row] = kept.without(pairs), asked[stays]
        return left[0] + left[1]

    def _leaving(
        self, scores: Float[Tensor, "K"], features: Tensor, count: int, protected: Bool[Tensor, "K"], prompt: Bool[Tensor, "K"]
    ) -> Pairs:
        """Which tokens leave, and what stands for them; both are of the prompt, which knows nothing of what follows."""
        chosen, places = self.reduction, torch.arange(len(scores), device=scores.device)
        options = {"protected": protected, "valid": prompt, "forward": chosen.merge_forward, "window": chosen.window}
        if chosen.kind == "utrc":
            return match(scores, features, count, **options)  # type: ignore[arg-type]
        if chosen.kind == "tome":
            return match((places % 2).float(), features, count, **options)  # type: ignore[arg-type]
        if chosen.kind == "random":
            size = int(prompt.sum())
            drawn = torch.rand(size, generator=torch.Generator().manual_seed(size))
            scores = torch.zeros_like(scores).masked_scatter(prompt, drawn.to(scores))
        order = places if chosen.kind == "truncate" else scores.argsort(stable=True)
        source = order[~protected[order]][:count]
        stays = prompt.clone()
        stays[source] = False
        left = stays.nonzero().flatten()
        after = left[torch.searchsorted(left, source).clamp_max(len(left) - 1)]
        return Pairs(source, after, torch.zeros_like(scores[source]))


def _padded(rows: list[Tensor], valid: Tensor, filler: float) -> Tensor:
    """Rows [K_b, ...] in the slots that count, [B, K, ...]."""
    found = rows[0].new_full((*valid.shape, *rows[0].shape[1:]), filler)
    found[valid] = torch.cat(rows)
    return found


def continuation_losses(network: nn.Module, reduced: Reduced, tokens: Int[Tensor, "B T"], start: int) -> Float[Tensor, "B S"]:
    """Negative log-likelihoods of the tokens from ``start`` on, in nats, after a prompt that is shortened.

    Only the prompt is shortened, by its own tokens; the continuation stays, and the logits that predict it are found by their places.

    Args:
        network: The model.
        reduced: What shortens it.
        tokens: Token ids without padding.
        start: Where the continuation begins, from 1.
    """
    reduced.protect = (torch.arange(tokens.shape[1], device=tokens.device) >= start).expand_as(tokens)
    logits = network(input_ids=tokens, use_cache=False).logits
    predicting = torch.arange(start - 1, tokens.shape[1] - 1, device=tokens.device).expand(len(tokens), -1)
    slots = torch.searchsorted(reduced.positions, predicting.contiguous())
    found = logits.gather(1, slots[..., None].expand(-1, -1, logits.shape[-1])).float()
    return nn.functional.cross_entropy(found.transpose(1, 2), tokens[:, start:], reduction="none")
