"""Training on images: a small Vim or PlainMamba from nothing, or a model as it is, with the patches that leave it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from duramen.hardware.machine import fastest_device
from duramen.problem import Problem
from duramen.registry import Place, method
from duramen.vision.opening import load_classifier
from duramen.vision.plainmamba import PlainMambaConfig, PlainMambaForImageClassification
from duramen.vision.studio import Studio
from duramen.vision.train import Classification, TrainingSettings, record_of, train_classifier
from duramen.vision.vim import VimConfig, VimForImageClassification

ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "vim": (VimConfig, VimForImageClassification),
    "plainmamba": (PlainMambaConfig, PlainMambaForImageClassification),
}


class Settings(TrainingSettings):
    """Settings of training."""

    architecture: Literal["vim", "plainmamba"] = "vim"
    """What is made where the recipe begins with `new`; a model that is there is trained as it is, with the patches that leave."""
    width: Annotated[int, Field(ge=8)] = 48
    """Of a new model: channels of the stream."""
    layers: Annotated[int, Field(ge=1)] = 6
    """Of a new model."""
    patch: Annotated[int, Field(ge=1)] = 4
    """Of a new model: pixels of a patch."""
    state_size: Annotated[int, Field(ge=1)] = 4
    """Of a new model: states per channel."""
    steps: Annotated[int, Field(ge=1)] = 600
    """How many."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    """Of AdamW at its height; about 5e-4 for a model that is trained already."""
    parent: Place = ""
    """Folder of a classifier of the same classes to imitate, which may be of another kind and size; empty for the dense model once patches leave, and for none before."""


def rehearse(studio: Studio, settings: Settings) -> None:
    """Makes a new classifier, and stops where there is none to imitate."""
    begin(studio, settings)
    if settings.parent:
        _parent(settings.parent, len(studio.train.classes))


@method(
    "train_images",
    title="Training on images",
    paper="arXiv 2401.09417, 2403.17695",
    kind="images",
    settings=Settings,
    rehearse=rehearse,
)
def apply(studio: Studio, settings: Settings) -> dict[str, Any]:
    """Makes or trains a classifier; see ``duramen.vision.train``."""
    network = begin(studio, settings)
    teacher = _parent(settings.parent, len(studio.train.classes)) if settings.parent else studio.dense
    task = Classification(
        network, studio.train, studio.aside, teacher, settings.distill_weight, settings.temperature, settings.mirror
    )
    history = train_classifier(task, settings.schedule, settings.learning_rate, folder=studio.folder, tell=studio.told)
    return {"trainings": [record_of(history, network, settings.learning_rate, distilled=teacher is not None)]}


def begin(studio: Studio, settings: Settings) -> Any:
    """The classifier that is trained, a new one where there is none yet."""
    if studio.network is not None:
        return studio.network
    config, model = ARCHITECTURES[settings.architecture]
    torch.manual_seed(settings.seed)
    _, channels, size, _ = studio.train.pixels([0]).shape
    own = {"stem": None, "kernel_size": 3} if settings.architecture == "plainmamba" else {}
    studio.network = model(
        config(
            hidden_size=settings.width, num_hidden_layers=settings.layers, image_size=size, patch_size=settings.patch,
            num_channels=channels, state_size=settings.state_size, id2label=dict(enumerate(studio.train.classes)), **own,
        )
    ).to(fastest_device())  # fmt: skip
    return studio.network


def _parent(name: str, classes: int) -> nn.Module:
    """The classifier to imitate.

    Raises:
        Problem: If it is not there, or tells other classes apart.
    """
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise Problem(
            f"There is no classifier `{name}`.", why="`parent` is the folder of one.", fix="the OUT folder of an earlier run."
        )
    network = load_classifier(folder)
    found = network.config.num_labels
    if found != classes:
        raise Problem(
            f"`{name}` tells {found} classes apart, and the images have {classes}.",
            why="each would be taught as another.",
            fix="a model of the same images.",
        )
    teacher: nn.Module = network
    return teacher
