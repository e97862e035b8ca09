"""Token reduction for state-space language models: prompts get shorter inside the network, and the weights stay as they are.

The step settles what the recipe leaves open, where tokens leave, how many at each place, and how later layers treat the gaps, by the cost of a prompt and by the loss on
the last quarter of every calibration sequence after the first three were shortened. What came out goes into ``reduction.json`` beside the weights.
"""

from __future__ import annotations

from itertools import product
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from duramen.calibrate.walker import Walk
from duramen.families.model import BlockModel
from duramen.problem import Problem
from duramen.registry import method
from duramen.tokens.cost import Unit, costs
from duramen.tokens.folder import FILE, ReducedModel
from duramen.tokens.model import Reduction, nearest_mixers, scanned_blocks
from duramen.tokens.schedule import Costs, published_sites, solve_keep, token_fraction

SHOWN = 256
"""Tokens of the sample that the report shows."""


class Settings(Reduction):
    """Settings of the step."""

    cut_of: Unit = "tokens"
    """What `cut` is a share of: the `tokens` that layers see, multiply-adds (`macs`) or measured `seconds` of a prompt."""
    length: Annotated[int, Field(ge=16)] = 2048
    """Tokens of the prompt that multiply-adds or seconds are counted for."""
    choose: bool = True
    """Whether the sites, `gap_step` and `aligned` are chosen on the calibration tokens; otherwise they are as given."""
    sequences: Annotated[int, Field(ge=1)] = 16
    """Calibration sequences by which that is chosen."""

    @property
    def leaves(self) -> tuple[str, ...]:
        """See ``duramen.order``."""
        return ("reduction",)


@method(
    "token_reduction",
    title="Token reduction",
    paper="Rethinking Token Reduction for State Space Models, arXiv 2410.14725",
    kind="reduce",
    settings=Settings,
)
@torch.no_grad()
def apply(model: BlockModel, tokens: Tensor, *, walk: Walk | None = None, **settings: object) -> dict[str, Any]:
    """Settles how prompts are shortened.

    Args:
        model: A model with state-space layers, opened from its folder.
        tokens: Calibration token ids, [S, T].
        walk: Where ``reduction.json`` is put down, and what is kept of an earlier run.
        **settings: See ``Settings``.

    Returns:
        What was settled and tried, what a prompt costs in every layer, and of one sequence after which layer every token leaves.

    Raises:
        Problem: If the model has no state-space layers, or so much cannot be cut.
    """
    chosen, walk = Settings.model_validate(settings), walk or Walk()
    if tokens.shape[1] < 16:
        raise Problem(
            f"Calibration sequences of {tokens.shape[1]} tokens are too short to shorten.",
            why="three quarters of each are shortened, and the loss on the last one decides.",
            fix="`calibration.length` of at least 16.",
        )
    prompt, ladders = candidates(model, chosen)
    tried: list[dict[str, Any]] = []

    def attempt(reduction: Reduction) -> None:
        losses = walk.memo(f"tried-{len(tried)}", lambda: _losses(model, tokens[: chosen.sequences], reduction))
        tried.append({"reduction": reduction.model_dump(mode="json"), "losses": losses, "loss": float(np.mean(losses))})

    for reduction in ladders:
        attempt(reduction)
    if chosen.choose:
        best = _best(tried)
        for gap_step, aligned in product(("hold", "bias"), (False, True)):
            if (gap_step, aligned) != (best.gap_step, best.aligned):
                attempt(best.model_copy(update={"gap_step": gap_step, "aligned": aligned}))
    reduction = _best(tried)
    walk.files[FILE] = reduction.model_dump_json(indent=1) + "\n"
    keep = dict(zip(reduction.sites, reduction.keep, strict=True))
    walk.first_batch = tokens[:1, :SHOWN]
    walk.final_hidden, left_after = _leaving(model, walk.first_batch, reduction)
    return {
        "reduction": reduction.model_dump(mode="json"), "tried": tried, "cut_of": chosen.cut_of, "length": chosen.length,
        "costs": {"dense": prompt.by_layer(chosen.length, {}), "reduced": prompt.by_layer(chosen.length, keep)},
        "saved": 1 - prompt.total(chosen.length, keep) / prompt.total(chosen.length, {}),
        "tokens": token_fraction(len(model.blocks), keep),
        "sample": {"ids": walk.first_batch[0].tolist(), "left_after": left_after},
    }  # fmt: skip


def candidates(model: BlockModel, chosen: Settings) -> tuple[Costs, list[Reduction]]:
    """What a prompt costs, and where tokens may leave: at the sites that were asked for, or the published ones; if it is to be chosen, also at all layers from a quarter, or from half of the depth on."""
    _, mixers = scanned_blocks(model.network)
    layers, matches = len(model.blocks), chosen.least > 0
    prompt = costs(chosen.cut_of, model, chosen.length, matches=matches, window=chosen.window)
    asked = {key: getattr(chosen, key) for key in Reduction.model_fields}
    ladders = [list(chosen.sites) or nearest_mixers(published_sites(layers), mixers)]
    if chosen.choose and not chosen.sites:
        deeper = ([layer for layer in mixers if first <= layer < layers - 1] for first in (layers // 4, layers // 2))
        ladders += [sites for sites in deeper if sites and sites not in ladders and _possible(prompt, sites, chosen)]
    found = []
    for sites in ladders:
        keep = chosen.keep or (solve_keep(prompt, sites, chosen.cut, tokens=chosen.length, least=chosen.least),) * len(sites)
        found.append(Reduction(**asked | {"sites": tuple(sites), "keep": keep}))
    return prompt, found


def _possible(prompt: Costs, sites: list[int], chosen: Settings) -> bool:
    """Whether so much can be cut at these sites."""
    return 1 - prompt.total(chosen.length, dict.fromkeys(sites, chosen.least)) / prompt.total(chosen.length, {}) > chosen.cut


def _best(tried: list[dict[str, Any]]) -> Reduction:
    """The first that was tried, or one that is better by more than two standard errors, sequence by sequence."""
    best = tried[0]
    for other in tried[1:]:
        gain = np.subtract(best["losses"], other["losses"])
        if gain.mean() > 2 * gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else False:
            best = other
    return Reduction.model_validate(best["reduction"])


def _losses(model: BlockModel, tokens: Tensor, reduction: Reduction) -> list[float]:
    """Mean loss of the last quarter of every sequence, in nats, after the first three were shortened."""
    reduced, context = ReducedModel(model, reduction), tokens.shape[1] - tokens.shape[1] // 4
    with reduced.reduced:
        hidden = reduced.last_hidden(torch.split(tokens, 1), [[context]] * len(tokens))
        return [_loss(reduced, state, row, context) for state, row in zip(hidden, tokens, strict=True)]


def _loss(model: BlockModel, state: Tensor, row: Tensor, context: int) -> float:
    targets, total = row[context:].to(state.device), 0.0
    for logs in model.log_probabilities(state[:, context - 1 : -1]):
        here, targets = targets[: len(logs)], targets[len(logs) :]
        total -= float(logs.gather(1, here[:, None]).sum(dtype=torch.float64))
    return total / (len(row) - context)


def _leaving(model: BlockModel, sample: Tensor, reduction: Reduction) -> tuple[Tensor, list[int | None]]:
    """What comes out of one sequence, [1, T, D], and after which layer every token leaves; None for those that stay."""
    reduced, length = ReducedModel(model, reduction), sample.shape[1]
    with reduced.reduced:
        (hidden,) = reduced.last_hidden([sample], [[length]])
    after: list[int | None] = [None] * length
    for layer, (kept, *_) in reversed(reduced.prompts[0].history.items()):
        for token in set(range(length)) - set(kept.positions.tolist()):
            after[token] = layer
    return hidden, after
