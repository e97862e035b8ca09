"""Classifiers, whatever their kind: opened with the patches that leave them, told others, and asked which were left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from duramen.hardware.machine import fastest_device
from duramen.problem import Exit, Problem
from duramen.reading import read_json
from duramen.vision.elastic import ElasticViTForImageClassification
from duramen.vision.patches import PatchReduction, patches_across
from duramen.vision.stream import VisionModel
from duramen.vision.vit import FAMILIES, ReducedViT, transformer_layers

HANDLE = "_duramen_reduced"


def load_classifier(folder: Path) -> Any:
    """Opens a folder; what its config says of patches that leave holds.

    Raises:
        Problem: If it is neither Vim nor PlainMamba nor a known transformer.
    """
    from transformers import AutoModelForImageClassification

    try:
        network = AutoModelForImageClassification.from_pretrained(folder).eval().to(fastest_device())
    except (OSError, ValueError) as error:
        raise Problem(
            f"{folder} cannot be opened as a classifier of images.", why=f"{str(error).splitlines()[0]}",
            fix="a folder that a run on images wrote, or one of a ViT, DeiT or DINOv2 with its head.",
            code=Exit.INCOMPATIBLE,
        ) from error  # fmt: skip
    if not isinstance(network, VisionModel | ElasticViTForImageClassification):
        transformer_layers(network)
    processor = folder / "preprocessor_config.json"
    if processor.is_file():
        said = read_json(processor)
        network.config.image_mean, network.config.image_std = said.get("image_mean"), said.get("image_std")
    reduction = getattr(network.config, "reduction", None)
    if reduction is not None:
        set_reduction(network, reduction)
    return network


def set_reduction(network: Any, reduction: dict[str, Any] | None) -> None:
    """Makes patches leave a classifier, or stay."""
    before = network.__dict__.pop(HANDLE, None)
    if before is not None:
        before.remove()
    network.config.reduction = reduction
    if reduction is not None and not isinstance(network, VisionModel):
        network.__dict__[HANDLE] = ReducedViT(network, PatchReduction.model_validate(reduction))


def tokens_outside(network: Any) -> tuple[int, ...]:
    """Places of the sequence that hold no patch."""
    if isinstance(network, VisionModel):
        return () if network.extra is None else (network.extra,)
    if isinstance(network, ElasticViTForImageClassification):
        return (0,)
    return tuple(range(FAMILIES[network.config.model_type]))


def side(network: Any) -> int:
    """Patches in a row."""
    return patches_across(network.config.image_size, network.config.patch_size)


@torch.no_grad()
def positions_left(network: nn.Module, pixels: Float[Tensor, "B c H W"]) -> Int[Tensor, "B K"]:
    """Where the tokens that are left in the end were at first; beyond the end for padding."""
    found = network(pixel_values=pixels)
    if isinstance(network, VisionModel):
        return found.positions  # type: ignore[no-any-return]
    reduced = network.__dict__.get(HANDLE)
    if reduced is None:
        length = side(network) ** 2 + len(tokens_outside(network))
        return torch.arange(length).expand(len(pixels), -1)
    return reduced.patches.positions  # type: ignore[no-any-return]
