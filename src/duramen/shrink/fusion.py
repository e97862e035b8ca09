"""Adaptive estimation fusion: coarse and fine importance, blended layer by layer as far as each is to be trusted.

"Efficient Pruning of Large Language Model with Adaptive Estimation Fusion" (Liu et al., arXiv 2403.10799; version 5 is called HyWIA).
Certain is what is fused, a score of whole vectors and one of single weights, and that an attention mechanism sets the share in each layer,
with no hand-set weight. The papers' formulas were not available to us: all algebra here is our own reading.

The attention: both scores are estimated from every sequence alone; the query is the consensus of the *other* sequences, so the score whose
estimates carry over from text to text gets the weight. Noise in one of them drives its share to zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from duramen.calibrate.backward import walk_back
from duramen.calibrate.walker import Records, Walk
from duramen.families.model import BlockModel, Model
from duramen.problem import Problem
from duramen.registry import method
from duramen.shrink import ablation
from duramen.shrink.allocate import Allocation, Scores
from duramen.shrink.groups import Units
from duramen.shrink.importance import Coarse, Estimates, Order, Taylor
from duramen.shrink.model import ShrinkSettings, budget, choose, kept_units, shrink_model
from duramen.shrink.plan import Plan

Fusion = Literal["attention", "fixed", "per_group", "ablation", "search"]


class Settings(ShrinkSettings):
    """Settings of adaptive estimation fusion."""

    allocation: Allocation = "global"
    """The least important units of the whole model (`global`); the same share in every block (`local`), whose result is a stock model in most families; or the former after standardising (`flap`)."""
    fusion: Fusion = "attention"
    """What sets the share a of the coarse score: agreement across sequences (`attention`), `weight` (`fixed`), relative variance unit by unit (`per_group`), measured loss of removed units (`ablation`), or the held-out loss after pruning with each of nine values (`search`)."""
    weight: float = Field(default=0.5, ge=0, le=1)
    """a for `fixed`: 1 is the coarse score alone, 0 the fine one."""
    temperature: float = Field(default=0.1, gt=0)
    """τ of `attention`."""
    order: Order = "second"
    """Terms of the salience that the fine score has."""
    coarse: Coarse = "per_sequence"
    """Where the coarse score comes from; see ``importance``."""
    gradient_sequences: int = Field(default=64, ge=1)
    """Sequences of the calibration text that gradients are taken of."""
    gradient_length: int = Field(default=128, ge=2)
    """Their length in tokens."""


def normalised(scores: Float[Tensor, "*N U"]) -> Float[Tensor, "*N U"]:
    """Scores over their mean, so that 0 keeps meaning *free*; all zeros stay zeros."""
    return scores / scores.mean(-1, keepdim=True).clamp_min(1e-30)


def attention_weight(coarse: Float[Tensor, "N U"], fine: Float[Tensor, "N U"], temperature: float = 0.1) -> float:
    """The share a of the coarse score, from how well each agrees with the consensus of the other sequences.

    Args:
        coarse: Estimates of every sequence alone, [N, U].
        fine: The same, [N, U].
        temperature: τ of the softmax over the two agreements.

    Returns:
        a in [0, 1]; one half where there is one sequence only.
    """
    if len(coarse) < 2:
        return 0.5
    votes = torch.stack([_votes(coarse.double()), _votes(fine.double())])
    others = votes.sum((0, 1)) - votes.sum(0)
    agreement = torch.nn.functional.cosine_similarity(votes, others[None], dim=-1).mean(1)
    return float(torch.softmax(agreement / temperature, 0)[0])


def _votes(estimates: Float[Tensor, "N U"]) -> Float[Tensor, "N U"]:
    """Each sequence's deviation from its mean, of length one; zero where all units are equal."""
    deviation = normalised(estimates) - 1
    return torch.nn.functional.normalize(deviation, dim=-1, eps=1e-12)


def inverse_variance_weight(coarse: Float[Tensor, "N U"], fine: Float[Tensor, "N U"]) -> Float[Tensor, "U"]:
    """The share of the coarse score of every unit: each weighs inversely to its relative variance over the sequences."""
    noise_coarse, noise_fine = (table.var(0) / table.mean(0).square().clamp_min(1e-30) for table in (coarse, fine))
    total = noise_coarse + noise_fine
    return torch.where(total > 0, noise_fine / total.clamp_min(1e-30), 0.5)


def fuse(coarse: Float[Tensor, "U"], fine: Float[Tensor, "U"], weight: float | Tensor) -> Float[Tensor, "U"]:
    """a·ĉ + (1 − a)·f̂ of the scores over their means, [U]."""
    return weight * normalised(coarse) + (1 - weight) * normalised(fine)


@dataclass
class Found:
    """The estimates of one kind of units in one block, and the share a of the coarse one."""

    units: Units
    estimates: Estimates
    weight: float | Tensor = 0.5

    def fused(self, weight: float | Tensor | None = None) -> Float[Tensor, "U"]:
        """The fused score, with this or another share; at the scale of the fine one, which is an estimate of the loss, so that blocks and kinds compare; [U]."""
        blended = fuse(self.estimates.coarse, self.estimates.fine, self.weight if weight is None else weight)
        return blended / blended.mean().clamp_min(1e-30) * self.estimates.fine.mean()


STRATA = 8
"""Trials of `ablation` for every kind of units in every block."""
TRIED = tuple(step / 8 for step in range(9))
"""Shares that `search` compares."""


def score(
    settings: Settings, model: BlockModel, units: list[Units], tokens: Tensor, walk: Walk
) -> tuple[Scores, dict[str, Any]]:
    """Importance of all units, and the share of the coarse score in every block and kind."""
    sequences, others = pieces(tokens, settings.gradient_sequences, settings.gradient_length)
    if settings.fusion in ("ablation", "search") and not len(others):
        raise Problem(
            f"`fusion: {settings.fusion}` has no text to measure on.", why=f"of {len(sequences)} pieces none is left to set apart.",
            fix="four sequences at least, or a smaller `gradient_length`.",
        )  # fmt: skip
    found: list[Found] = []
    taylor = Taylor(
        units, len(sequences), sequences.shape[1] - 1,
        order=settings.order, coarse=settings.coarse, give=lambda each, estimates: found.append(Found(each, estimates)),
    )  # fmt: skip
    losses = walk_back(model, sequences, taylor, walk=walk)
    found.sort(key=lambda each: each.units.block)
    set_shares(settings, model, found, others, walk)
    shares = {each.units.reader: float(torch.as_tensor(each.weight).mean()) for each in found}
    return fused_scores(found), {"coarse_share": shares, "loss": sum(losses) / len(losses)}


def pieces(tokens: Tensor, count: int, length: int) -> tuple[Tensor, Tensor]:
    """So many pieces of so many tokens, from all over the calibration sequences, and as many others; [S, T] -> twice [N, length]."""
    length = min(length, tokens.shape[1])
    cut = tokens[:, : tokens.shape[1] // length * length].reshape(-1, length)
    aside = torch.arange(len(cut)) % 4 == 3
    return tuple(part[:: max(1, len(part) // count)][:count] for part in (cut[~aside], cut[aside]))  # type: ignore[return-value]


def fused_scores(found: list[Found], weight: float | None = None) -> Scores:
    """The fused score of all units, each with its own share a, or all with this one."""
    return {(each.units.block, each.units.kind): each.fused(weight) for each in found}


def set_shares(settings: Settings, model: BlockModel, found: list[Found], others: Tensor, walk: Walk) -> None:
    """Decides a for every kind of units in every block; what is measured for it is measured on other sequences, [N, T]."""
    if settings.fusion == "ablation":
        _fit_ablations(model, found, others, walk)
        return
    best = _searched(settings, model, found, others) if settings.fusion == "search" else settings.weight
    for each in found:
        tables = each.estimates.coarse_table, each.estimates.fine_table
        if settings.fusion == "attention":
            each.weight = attention_weight(*tables, settings.temperature)
        elif settings.fusion == "per_group":
            each.weight = inverse_variance_weight(*tables)
        else:
            each.weight = best


def _fit_ablations(model: BlockModel, found: list[Found], sequences: Tensor, walk: Walk) -> None:
    """Takes units away by strata of their score, block by block, and fits both scores to what the loss does."""
    trials = [(each.units, part) for each in found for part in ablation.strata(each.fused(), STRATA)]
    rises = ablation.loss_rises(model, trials, sequences, walk=walk)
    for each in found:
        mine = [number for number, (units, _) in enumerate(trials) if units is each.units]
        coarse, fine = (
            torch.stack([scores[trials[number][1]].sum() for number in mine])
            for scores in (each.estimates.coarse, each.estimates.fine)
        )
        means = float(each.estimates.coarse.mean()), float(each.estimates.fine.mean())
        each.weight = ablation.fit_share(coarse, fine, rises[mine], means)


def _searched(settings: Settings, model: BlockModel, found: list[Found], sequences: Tensor) -> float:
    """The shared a with the least loss after pruning, before any repair."""
    units = [each.units for each in found]
    _, wanted = budget(model, units, settings)
    plans = [
        Plan("", len(model.blocks), kept_units(model, units, choose(units, fused_scores(found, a), wanted, settings)))
        for a in TRIED
    ]
    losses = ablation.masked_losses(model, plans, sequences).mean(1)
    return TRIED[int(losses.argmin())]


@method("fusion", title="Adaptive estimation fusion", paper="arXiv 2403.10799", kind="shrink", settings=Settings)
def apply(model: Model, tokens: Tensor, *, walk: Walk | None = None, **settings: object) -> Records:
    """Cuts the units that the fused score finds least important; see ``shrink_model``."""
    chosen = Settings.model_validate(settings)
    return shrink_model(partial(score, chosen), "fusion", model, tokens, chosen, walk=walk)
