"""Patch pruning: the patches of an image that matter least leave a state-space model on the way, and the others keep their places on every path."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from duramen.registry import method
from duramen.tokens.schedule import solve_keep, vision_sites
from duramen.vision.cost import patch_costs, sequence_length
from duramen.vision.opening import set_reduction
from duramen.vision.patches import PatchReduction
from duramen.vision.studio import Studio


class Settings(PatchReduction):
    """Settings of patch pruning."""

    keep: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    """What share of the patches that are there stays at each site, one number for all or one for each; empty for what saves `cut`."""
    cut: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """Share of the multiply-adds of an image to save, where `keep` does not say."""


@method("patch_pruning", title="Patch pruning", paper="arXiv 2409.18962", kind="images", settings=Settings)
def apply(studio: Studio, settings: Settings) -> dict[str, Any]:
    """Settles which patches leave and where; the weights stay as they are.

    Raises:
        Problem: If there is no model yet, or so much cannot be saved.
    """
    network = studio.model
    layers = network.config.num_hidden_layers
    sites = settings.sites or tuple(vision_sites(layers))
    prompt, length = patch_costs(network), sequence_length(network)
    keep = settings.keep or (solve_keep(prompt, sites, settings.cut, tokens=length),)
    reduction = PatchReduction.model_validate(settings.model_dump(exclude={"cut"}) | {"sites": sites, "keep": keep})
    shares = reduction.by_layer(layers)
    set_reduction(network, reduction.model_dump(mode="json"))
    dense = prompt.total(length, {})
    return {
        "reduction": network.config.reduction, "tokens": length, "macs": {"dense": dense, "reduced": prompt.total(length, shares)},
    }  # fmt: skip
