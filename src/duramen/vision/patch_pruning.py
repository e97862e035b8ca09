"""Patch pruning: the patches of an image that matter least leave a model on the way, and the others keep their places on every path.

The step settles what the recipe leaves open, where patches leave, by what they are ranked and how a scan treats the gaps, by the loss on held-out images; how many leave follows
from the multiply-adds that are to be saved. What came out stands in the model's config.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import product
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch.nn.functional import cross_entropy

from duramen.registry import method
from duramen.tokens.schedule import HALF, Costs, cannot_cut, solve_keep, vision_sites
from duramen.vision.cost import patch_costs, sequence_length
from duramen.vision.images import Images, in_parts, seen_by
from duramen.vision.opening import set_reduction
from duramen.vision.patches import PatchReduction, PatchScore
from duramen.vision.stream import VisionModel
from duramen.vision.studio import Studio
from duramen.vision.train import logits_of


class Settings(PatchReduction):
    """Settings of patch pruning."""

    sites: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Layers after which patches leave, from 0; empty for the published places (after 5, 10 and 15 of 24), or with `choose` every layer of the second half, whichever is better."""
    keep: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    """What share of the patches that are there stays at each site, one number for all or one for each; empty for what saves `cut`."""
    cut: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """Share of the multiply-adds of an image to save, where `keep` does not say."""
    adaptive: bool = False
    """Whether every image keeps as many patches as have a share of its importance, the same for all and such that `cut` is saved in the mean over held-out images; not for transformers."""
    choose: bool = True
    """Whether `sites` (where none are given), `score` and `gap_step` are chosen on held-out images; otherwise they are as given. Only for `kind: top`."""
    images: Annotated[int, Field(ge=1)] = 512
    """Held-out images by which these are chosen."""

    @property
    def chooses(self) -> bool:
        """Whether anything is chosen."""
        return self.choose and self.kind == "top"

    @property
    def reads_aside(self) -> bool:
        """Whether held-out images decide anything."""
        return self.chooses or self.adaptive

    @model_validator(mode="after")
    def _mass_is_found_or_given(self) -> Settings:
        if self.adaptive and (self.mass is not None or self.keep or self.kind != "top"):
            raise ValueError(
                "`adaptive` finds the `mass` that saves `cut`, for `kind: top`; give neither `mass` nor `keep` beside it"
            )
        return self


def rehearse(studio: Studio, settings: Settings) -> None:
    """Stops where so much cannot be saved, or the model cannot do what is asked for."""
    network = studio.model
    for reduction in candidates(network, patch_costs(network), sequence_length(network), settings):
        reduction.by_layer(network.config.num_hidden_layers)
    set_reduction(network, reduction.model_dump(mode="json"))


@method(
    "patch_pruning",
    title="Patch pruning",
    paper="arXiv 2409.18962",
    kind="images",
    settings=Settings,
    rehearse=rehearse,
)
@torch.no_grad()
def apply(studio: Studio, settings: Settings) -> dict[str, Any]:
    """Settles which patches leave and where; the weights stay as they are.

    Raises:
        Problem: If there is no model yet, or so much cannot be saved.
    """
    network = studio.model
    costs, length = patch_costs(network), sequence_length(network)
    tried = []
    for reduction in candidates(network, costs, length, settings):
        if settings.adaptive:
            reduction = _adaptive(studio, reduction, costs, settings)
        set_reduction(network, reduction.model_dump(mode="json"))
        tried.append(
            {
                "reduction": network.config.reduction,
                "loss": _loss(network, studio.aside, settings.images) if settings.chooses else None,
            }
        )
    best = min(tried, key=lambda each: each["loss"] or 0.0)
    set_reduction(network, best["reduction"])
    final = PatchReduction.model_validate(best["reduction"])
    if final.mass is None:
        reduced = costs.total(length, final.by_layer(network.config.num_hidden_layers))
    else:
        reduced = mean_cost(network, studio.aside, costs, settings.images)
    return {
        "reduction": best["reduction"], "tried": tried, "tokens": length, "macs": {"dense": costs.total(length, {}), "reduced": reduced},
    }  # fmt: skip


def _adaptive(studio: Studio, reduction: PatchReduction, costs: Costs, settings: Settings) -> PatchReduction:
    """The same with the share of importance that saves enough in the mean; the saving falls as it grows, so by bisection."""
    network = studio.model
    dense, low, high = costs.total(sequence_length(network), {}), 0.01, 0.999

    def saved(mass: float) -> float:
        set_reduction(network, reduction.model_copy(update={"mass": mass}).model_dump(mode="json"))
        return 1 - mean_cost(network, studio.aside, costs, settings.images) / dense

    most = saved(low)
    if most < settings.cut:
        raise cannot_cut(costs, reduction.sites, settings.cut, most)
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if saved(middle) > settings.cut else (low, middle)
    return reduction.model_copy(update={"mass": low})


def mean_cost(network: Any, images: Images, costs: Costs, count: int) -> float:
    """Multiply-adds of an image, the mean over some, by what is left in each."""
    sites, length = network.config.reduction["sites"], sequence_length(network)
    found = [
        sum(of_layer([length, *left][bisect_left(sites, layer)]) for layer, of_layer in enumerate(costs.layers))
        for pixels, _ in in_parts(images, count)
        for left in network(pixel_values=seen_by(network, pixels)).counts.tolist()
    ]
    return costs.outside + sum(found) / len(found)


def candidates(network: Any, costs: Costs, length: int, settings: Settings) -> list[PatchReduction]:
    """What may be settled; the first is what the settings say.

    Raises:
        Problem: If so much cannot be saved at the places that were asked for.
    """
    layers, scans = network.config.num_hidden_layers, isinstance(network, VisionModel)
    own = {key: getattr(settings, key) for key in PatchReduction.model_fields}
    ladders = [tuple(settings.sites or vision_sites(layers))]
    variants = [(settings.score, settings.gap_step)]
    if settings.chooses:
        later = tuple(range(layers // 2 - 1, layers - 1))
        if not settings.sites and later and later not in ladders:
            ladders.append(later)
        scores: tuple[PatchScore, ...] = ("write", "clip", "delta") if scans else ("write", "attention")
        variants += [
            each for each in product(scores, ("bias", "hold") if scans else (settings.gap_step,)) if each not in variants
        ]
    found = []
    for number, sites in enumerate(ladders):
        if number and len(settings.keep) not in (0, 1, len(sites)):
            continue
        if number and not (settings.keep or settings.mass) and not _possible(costs, sites, settings.cut, length):
            continue
        least = HALF if settings.kind == "merge" else 0.0
        keep = settings.keep or (
            1.0
            if settings.mass is not None or settings.adaptive
            else solve_keep(costs, sites, settings.cut, tokens=length, least=least),
        )
        found += [
            PatchReduction(**own | {"sites": sites, "keep": keep, "score": score, "gap_step": gap}) for score, gap in variants
        ]
    return found


def _possible(costs: Costs, sites: tuple[int, ...], cut: float, length: int) -> bool:
    """Whether so much can be saved at these sites, with patches left at the last."""
    return 1 - costs.total(length, dict.fromkeys(sites, 0.25)) / costs.total(length, {}) > cut


def _loss(network: Any, images: Images, count: int) -> float:
    """Mean cross-entropy of some images."""
    losses = []
    for pixels, labels in in_parts(images, count):
        logits = logits_of(network, pixels)
        losses.append(cross_entropy(logits, labels.to(logits.device), reduction="none"))
    return float(torch.cat(losses).mean())
