"""Official weights of Vim and PlainMamba: which architecture a file holds, and its tensors under our names, which are the official ones but for a prefix."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duramen.problem import Exit, Problem
from duramen.vision.plainmamba import PlainMambaConfig, PlainMambaForImageClassification
from duramen.vision.vim import VimConfig, VimForImageClassification

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
"""By which the official models' images are normalised."""


def read_official(file: Path) -> VimForImageClassification | PlainMambaForImageClassification:
    """Opens a file of official weights; nothing in it is executed.

    Args:
        file: A ``.pth``, with the state under ``model`` or ``state_dict`` or by itself.

    Raises:
        Problem: If it holds anything but tensors, or no model of these.
    """
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise Problem(
            f"{file} cannot be opened.", why=f"it is damaged, or holds more than tensors: {type(error).__name__}.",
            fix="a file of weights alone; others could run code when they are read.",
            code=Exit.INCOMPATIBLE,
        ) from error  # fmt: skip
    state = found.get("model", found.get("state_dict", found)) if isinstance(found, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise Problem(
            f"{file} holds no weights by their names.", why="a state is a dictionary of tensors, under `model`, `state_dict` or by itself.",
            fix="a file of the model as published.", code=Exit.INCOMPATIBLE,
        )  # fmt: skip
    return from_official(state)


def from_official(state: dict[str, Tensor]) -> VimForImageClassification | PlainMambaForImageClassification:
    """The model of an official state, its shape read off the tensors; images must be square.

    Raises:
        Problem: If tensors are missing or unknown, which are named.
    """
    named = {
        re.sub(r"^(backbone\.|head\.fc\.)", lambda found: "head." if "fc" in found[0] else "", key): value
        for key, value in state.items()
    }
    if "layers.0.mixer.A_b_log" in named:
        network: Any = VimForImageClassification(_vim(named))
    elif "layers.0.mamba.direction_Bs" in named:
        network = PlainMambaForImageClassification(_plainmamba(named))
    else:
        raise Problem(
            "These weights are of neither Vim nor PlainMamba.",
            why="the first layer has neither a backward scan nor vectors of directions.",
            fix="a file of one of these two; hierarchical models keep no sequence that could be shortened.",
            code=Exit.INCOMPATIBLE,
        )
    here = network.state_dict()
    odd = [f"{name} {tuple(named[name].shape)}" for name in here if name in named and named[name].shape != here[name].shape]
    missing, unknown = ([], []) if odd else network.load_state_dict(named, strict=False)
    if odd or missing or unknown:
        raise Problem(
            f"These weights do not fit {type(network).__name__}.",
            why="; ".join(f"{what}: {', '.join(names[:5])}" for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", odd)) if names) + ".",
            fix="a file of the model as published, with its head.",
            code=Exit.INCOMPATIBLE,
        )  # fmt: skip
    network.config.image_mean, network.config.image_std = IMAGENET["image_mean"], IMAGENET["image_std"]
    return network.eval()  # type: ignore[no-any-return]


def _shape(named: dict[str, Tensor], projection: str, places: int, a_log: str) -> dict[str, Any]:
    width, channels, _, patch = _known(named, projection).shape
    layers = 1 + max(int(found[1]) for found in (re.match(r"layers\.(\d+)\.", key) for key in named) if found)
    side = round((_known(named, "pos_embed").shape[1] - places) ** 0.5)
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_channels": channels, "patch_size": patch,
        "image_size": side * patch, "state_size": _known(named, a_log).shape[1], "num_labels": len(_known(named, "head.bias")),
    }  # fmt: skip


def _known(named: dict[str, Tensor], key: str) -> Tensor:
    if key not in named:
        raise Problem(
            f"These weights have no {key}.",
            why="the file is incomplete.",
            fix="the file as published, with its head.",
            code=Exit.INCOMPATIBLE,
        )
    return named[key]


def _vim(named: dict[str, Tensor]) -> VimConfig:
    shape = _shape(named, "patch_embed.proj.weight", 1, "layers.0.mixer.A_log")
    return VimConfig(**shape, kernel_size=_known(named, "layers.0.mixer.conv1d.weight").shape[-1])


def _plainmamba(named: dict[str, Tensor]) -> PlainMambaConfig:
    """With the habits of the official code, which its weights have learned."""
    shape = _shape(named, "patch_embed.projection.weight", 0, "layers.0.mamba.A_log")
    stem = sum(bool(re.match(r"patch_embed\.convs\.\d+\.weight", key)) and value.ndim == 4 for key, value in named.items())
    has_stem = "patch_embed.stem.0.weight" in named
    if has_stem:
        patch = 2 * shape["patch_size"]
        shape |= {
            "num_channels": named["patch_embed.stem.0.weight"].shape[1],
            "patch_size": patch,
            "image_size": shape["image_size"] * 2,
        }
    return PlainMambaConfig(
        **shape, stem=stem if has_stem else None, local="layers.0.dw.0.weight" in named,
        kernel_size=_known(named, "layers.0.mamba.conv2d.weight").shape[-1], official_pairing=True, double_dt_bias=True,
    )  # fmt: skip
