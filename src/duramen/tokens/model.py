"""Token reduction inside a state-space language model: after some layers some tokens of the prompt leave, and all later layers work on fewer.

Unified Token Reduction by token importance Classification ("Rethinking Token Reduction for State Space Models", arXiv 2410.14725), with what its text leaves open
decided as in ``match`` and ``compact``. Both branches of a block, what it adds (Y) and what it adds to (X), lose the same tokens: half of the pairs of Y
are dropped and half merge, all of X merge. By default tokens are dropped and nothing merges, which was better wherever we measured. Each layer's state is built from the tokens that reach it, and generation goes on from there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Annotated, Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from duramen.finite import all_finite
from duramen.override import override
from duramen.problem import Exit, Problem
from duramen.registry import Settings as MethodSettings
from duramen.ssm.fold import GapStep
from duramen.ssm.mixer import ExactScans, Passage, find_mixers
from duramen.tokens.compact import Kept, reduce, staying
from duramen.tokens.match import Pairs, match
from duramen.tokens.prompt import Prompt
from duramen.tokens.schedule import HALF, counted_tokens, kept_count, published_sites, solve_keep
from duramen.tokens.score import Score, importance

MARK = "_duramen_reduced"
"""Where a model keeps what shortens it."""
Kind = Literal["utrc", "tome", "prune", "random", "truncate"]


class Reduction(MethodSettings):
    """What leaves, and where; `prune_share`, `residual`, `merge_forward`, `sizes` and `window` are of the kinds that merge."""

    kind: Kind = "prune"
    """`prune` drops the least important tokens; `utrc`, the published way, matches the less important half with the others and merges what is most alike, `tome` every second token with the others; `random` drops any, `truncate` the oldest."""
    score: Score = "write"
    """How important a token is: by what it writes (`write`), its step alone (`delta`), or its output (`clip`, the published one, `l1`, `l2`, `sum`)."""
    cut: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """How many fewer tokens the mean layer sees."""
    sites: tuple[int, ...] = ()
    """Layers after which tokens leave, from 0; empty for the published ones."""
    keep: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    """What share stays at each site; empty for the same at all of them, so that `cut` comes out."""
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

    @model_validator(mode="after")
    def _one_share_for_each_site(self) -> Reduction:
        if list(self.sites) != sorted(set(self.sites)):
            raise ValueError("sites must rise")
        if self.keep and len(self.keep) != len(self.sites):
            raise ValueError(f"{len(self.keep)} shares in `keep` for {len(self.sites)} `sites`")
        if self.keep and min(self.keep) < self.least:
            raise ValueError(
                f"`kind: {self.kind}` merges at most half of the tokens at a site, and `keep` has {min(self.keep)}"
            )
        return self

    @property
    def least(self) -> float:
        """Share that stays at a site, however much is to leave."""
        return HALF if self.kind in ("utrc", "tome") else 0.0

    @property
    def shares(self) -> tuple[float, float]:
        """Which share of the pairs is dropped from what blocks add, and from the stream that they add to."""
        if self.kind == "utrc":
            return self.prune_share, float(self.residual == "prune")
        return (0.0, 0.0) if self.kind == "tome" else (1.0, 1.0)


class Reduced:
    """A state-space model that takes tokens out of every prompt, until ``remove`` or the end of a ``with``.

    A prompt is what comes in with more than one token and nothing cached; everything else passes as it is. Attention layers of hybrids see what is
    left at the places that it had, and new tokens go on from the length that the prompt had.

    Args:
        network: A transformers model with state-space layers.
        reduction: What leaves, and where.

    Attributes:
        protect: Further tokens of the next prompt that stay and do not count for what is to leave, bool [B, T]; set by the user.
        prompt: What is left of the last prompt.
        keep: What share stays, by the layers after which tokens leave.

    Raises:
        Problem: If the model has no state-space layer, or none where tokens are to leave, or the cut is impossible at these sites; or if it is shortened already.
    """

    def __init__(self, network: nn.Module, reduction: Reduction | None = None) -> None:
        if MARK in network.__dict__:
            raise Problem(
                "This model shortens its prompts already.", why="tokens that have left cannot leave again.",
                fix="`remove()` of what shortens it; `network.reduced` where `duramen.load` opened it.",
            )  # fmt: skip
        self.reduction = reduction or Reduction()
        self.protect: Tensor | None = None
        self.prompt: Prompt
        self._reading, self._cached = False, WeakKeyDictionary[Any, Prompt]()
        blocks, mixers = scanned_blocks(network)
        sites = list(self.reduction.sites) or nearest_mixers(published_sites(len(blocks)), mixers)
        if missing := sorted(set(sites) - mixers.keys()):
            raise Problem(
                f"No token can leave after layer {missing[0]}, which is no state-space layer of this model.",
                why="how important a token is, is read off the scan of the layer that it leaves after.",
                fix=f"sites among {', '.join(map(str, mixers))}.",
                code=Exit.INCOMPATIBLE,
            )
        one = (
            1.0
            if self.reduction.keep
            else solve_keep(counted_tokens(len(blocks)), sites, self.reduction.cut, least=self.reduction.least)
        )
        self.keep = dict(zip(sites, self.reduction.keep or [one] * len(sites), strict=True))
        gap_step, aligned = self.reduction.gap_step, self.reduction.aligned
        self._passages = {layer: Passage(gap_step=gap_step, aligned=aligned, watch=layer in self.keep) for layer in mixers}
        self._scans = ExactScans(network, {name: self._passages[layer] for layer, name in mixers.items()})
        self._first_state = int(network.get_submodule(next(iter(mixers.values()))).layer_idx)  # type: ignore[arg-type]
        base = network.get_submodule(str(network.base_model_prefix))
        self._undo = [override(base, partial(self._read, base, base.forward, list(signature(base.forward).parameters)))]
        for layer, block in enumerate(blocks):
            names = list(signature(block.forward).parameters)
            attends = any(name.rpartition(".")[2] == "q_proj" for name, _ in block.named_modules())
            mask = next(name for name in ("causal_mask", "attention_mask") if name in names) if attends else None
            run = partial(self._run, layer, block.forward, names, mask)
            self._undo.append(override(block, run))
        self._network, network.__dict__[MARK] = network, self

    def remove(self) -> None:
        """Gives the model its own way back."""
        while self._undo:
            self._undo.pop()()
        self._scans.remove()
        self._network.__dict__.pop(MARK, None)

    def __enter__(self) -> Reduced:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _read(self, base: nn.Module, forward: Callable[..., Any], names: list[str], *args: Any, **kwargs: Any) -> Any:
        """The whole model: a prompt begins, or new tokens follow one."""
        given: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
        cache, embedded = given.get("cache"), given.get("inputs_embeds")
        tokens = given["input_ids"] if embedded is None else embedded[..., 0]
        self._reading = tokens.shape[1] > 1 and (cache is None or cache.get_recurrent_state(self._first_state) is None)
        before = None if cache is None else self._cached.get(cache)
        if self._reading:
            if base.training:
                raise Problem(
                    "A model that shortens its prompts cannot be trained.",
                    why="which tokens leave is a choice that no gradient passes through.",
                    fix="`network.eval()`; or train the dense model.",
                )
            mask, valid = given.get("attention_mask"), torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
            if isinstance(mask, Tensor) and mask.shape == valid.shape:
                valid = mask.bool()
            self.prompt = Prompt.begin(valid, given.get("position_ids"), self.protect)
            self.protect = None
        elif before is not None and "position_ids" in names:
            given |= {"position_ids": before.following(tokens.shape[1]), "attention_mask": None}
        return forward(**given)

    def _run(
        self, layer: int, forward: Callable[..., Any], names: list[str], mask: str | None, *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Any, ...]:
        """One block, whose attention, if it has any, takes its mask by a name, and what leaves after it."""
        given: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
        hidden, cache, passage = given[names[0]], given.get("cache"), self._passages.get(layer)
        if not self._reading:
            if passage is not None:
                passage.valid = passage.places = None
            before = None if cache is None else self._cached.get(cache)
            if mask and before is not None and cache is not None:
                given[mask] = before.mask_after(layer, cache.get_seq_length(layer), hidden.shape[1], hidden.dtype)
            return forward(**given)  # type: ignore[no-any-return]
        prompt = self.prompt
        if cache is not None:
            self._cached[cache] = prompt
        if mask:
            prompt.attended[layer] = prompt.valid
        if prompt.shortened:
            given = prompt.told(given, besides=names[0], causal=mask)
        if passage is not None:
            passage.valid, passage.places = prompt.padding, prompt.positions if prompt.shortened else None
        out = forward(**given)
        if layer not in self.keep:
            return out  # type: ignore[no-any-return]
        assert passage is not None
        if isinstance(out, tuple):
            return (self._shorten(layer, hidden, out[0], passage), *out[1:])
        return self._shorten(layer, hidden, out, passage)

    def _shorten(self, layer: int, hidden: Tensor, out: Tensor, passage: Passage) -> Tensor:
        """What is left after a site, [B, K, D] -> [B, K', D]."""
        prompt = self.prompt
        assert passage.seen is not None
        scores, passage.seen = importance(self.reduction.score, **passage.seen._asdict()), None
        if not all_finite(scores[prompt.valid]):
            raise Problem(
                f"A token's importance after layer {layer} is not finite.",
                why="the scan of that layer overflowed, or the model's weights are damaged.",
                fix="`duramen inspect` names damaged tensors; otherwise `dtype: float32`.",
                code=Exit.CHECK_FAILED,
            )
        left = [
            self._shorten_row(
                hidden[row][there], out[row][there], scores[row][there], prompt.kept[row], prompt.asked[row], self.keep[layer]
            )
            for row, there in enumerate(prompt.valid)
        ]
        rows, kept, asked = (list(each) for each in zip(*left, strict=True))
        return prompt.leave(layer, rows, kept, asked)

    def _shorten_row(
        self, stream: Tensor, out: Tensor, scores: Tensor, kept: Kept, asked: Tensor, keep: float
    ) -> tuple[Tensor, Kept, Tensor]:
        """What is left of one row, [K, D], of what is known of it, and of what the user asked for, where a share is to stay."""
        chosen = self.reduction
        protected = asked.clone()
        protected[: chosen.first] = True
        protected[(~asked).nonzero().flatten()[-chosen.last :]] = True
        count = int((~asked).sum())
        pairs = self._leaving(scores, out - stream, count - kept_count(count, keep), protected, ~asked)
        stays, sizes = staying(len(stream), pairs), kept.sizes if chosen.sizes else None
        rows = out[stays]
        if len(pairs.source) and min(chosen.shares) < 1:
            dropped, fewer = chosen.shares
            rows = reduce(out - stream, pairs, prune_share=dropped, sizes=sizes)
            rows = rows + reduce(stream, pairs, prune_share=fewer, sizes=sizes)
        return rows, kept.without(pairs), asked[stays]

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


def scanned_blocks(network: nn.Module) -> tuple[nn.ModuleList, dict[int, str]]:
    """The blocks of a model, and the names of their state-space mixers by block.

    Raises:
        Problem: If it has none of the known kinds.
    """
    mixers = list(find_mixers(network))
    if not mixers:
        raise Problem(
            f"{type(network).__name__} has no state-space layers that can be shortened.",
            why="tokens leave by what a scan makes of them, and this model has none, or one of another kind.",
            fix="a model of mamba, falcon_mamba, mamba2, jamba, bamba, zamba2 or nemotron_h.",
            code=Exit.INCOMPATIBLE,
        )
    found = re.match(r"(.*?)\.\d+\.", mixers[0])
    assert found
    blocks = network.get_submodule(found[1])
    assert isinstance(blocks, nn.ModuleList)
    return blocks, {int(name.removeprefix(f"{found[1]}.").partition(".")[0]): name for name in mixers}


def nearest_mixers(sites: list[int], mixers: Mapping[int, str]) -> list[int]:
    """The last state-space layer up to each site."""
    found = (max((layer for layer in mixers if layer <= site), default=min(mixers)) for site in sites)
    return sorted(set(found))


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
    slots = torch.searchsorted(reduced.prompt.positions, predicting.contiguous())
    found = logits.gather(1, slots[..., None].expand(-1, -1, logits.shape[-1])).float()
    return nn.functional.cross_entropy(found.transpose(1, 2), tokens[:, start:], reduction="none")
