"""Training of image classifiers, on labels and towards a teacher; what a step sees, mirrored or not, follows from its number alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from duramen.train.loop import History, train
from duramen.train.schedule import Schedule
from duramen.train.settings import ScheduleSettings
from duramen.vision.images import Images, in_parts, seen_by


class TrainingSettings(ScheduleSettings):
    """What every step takes that trains a classifier."""

    batch: Annotated[int, Field(ge=1)] = 128
    """Images of a step."""
    at_once: Annotated[int, Field(ge=1)] = 128
    """Images that run together; fewer take less memory and give the same."""
    every: Annotated[int, Field(ge=1)] = 50
    """Steps between checkpoints, at which the held-out loss is taken; the model is what it was at the best of them."""
    mirror: bool = True
    """Whether images are also learned mirrored."""
    distill_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the divergence from the model that is imitated in the loss."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """By which both models' logits are divided in that divergence, which then counts its square."""

    @property
    def reads_aside(self) -> bool:
        """Whether held-out images decide anything: which checkpoint is best."""
        return True


@dataclass
class Classification:
    """A task for ``duramen.train.loop``; every image counts once, and once more mirrored.

    Attributes:
        network: What learns.
        images: What it sees.
        aside: What decides which checkpoint is best.
        teacher: What it imitates, which sees the images at its own size and in its own colours; None for labels alone.
        share: Of the divergence from the teacher in the loss.
        temperature: By which the logits of both are divided in the divergence, which then counts its square.
        mirror: Whether images are also learned mirrored.
    """

    network: nn.Module
    images: Images
    aside: Images
    teacher: nn.Module | None = None
    share: float = 0.5
    temperature: float = 2.0
    mirror: bool = True

    @property
    def sequences(self) -> int:
        """How many images there are, mirrored ones counted."""
        return len(self.images.labels) * (1 + self.mirror)

    def targets(self, index: int) -> int:
        """One class per image."""
        return 1

    def loss(self, indices: Sequence[int]) -> Tensor:
        """Sum over some images."""
        pixels, labels = self.batch(indices)
        return self.terms(logits_of(self.network, pixels), pixels, labels)["loss"]

    def batch(self, indices: Sequence[int]) -> tuple[UInt8[Tensor, "B c H W"], Int[Tensor, "B"]]:
        """Some images, mirrored or not, and their classes."""
        count = len(self.images.labels)
        pixels = self.images.pixels([index % count for index in indices])
        mirrored = torch.tensor([index >= count for index in indices])
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        return pixels, self.images.labels[[index % count for index in indices]]

    def held_out(self) -> dict[str, float]:
        """Means over the held-out images: of the loss and its terms, and the share of wrong classes."""
        found: Counter[str] = Counter()
        for pixels, labels in in_parts(self.aside):
            for name, term in self.terms(logits_of(self.network, pixels), pixels, labels).items():
                found[name] += float(term)  # type: ignore[assignment]
        return {name: term / len(self.aside.labels) for name, term in found.items()}

    def terms(
        self, logits: Float[Tensor, "B C"], pixels: UInt8[Tensor, "B c H W"], labels: Int[Tensor, "B"]
    ) -> dict[str, Tensor]:
        """The loss of some images, what it is made of, and how many are told wrong; sums."""
        labels = labels.to(logits.device)
        likelihood = cross_entropy(logits, labels, reduction="sum")
        wrong = (logits.argmax(-1) != labels).sum()
        if self.teacher is None:
            return {"loss": likelihood, "wrong": wrong}
        heat = self.temperature
        with torch.no_grad():
            taught = log_softmax(logits_of(self.teacher, pixels) / heat, -1)
        apart = heat**2 * kl_div(log_softmax(logits / heat, -1), taught, log_target=True, reduction="sum")
        loss = (1 - self.share) * likelihood + self.share * apart
        return {"loss": loss, "likelihood": likelihood, "divergence": apart, "wrong": wrong}


def train_classifier(
    task: Classification,
    schedule: Schedule,
    rate: float,
    *,
    folder: Path | None = None,
    tell: Callable[[int, float], None] = lambda step, loss: None,
) -> History:
    """Trains all of a network, or goes on where an earlier run stopped; batch norms keep their means.

    Args:
        task: What is learned.
        schedule: How long, in how large steps.
        rate: The learning rate of AdamW at its height.
        folder: Where checkpoints are kept; None for nowhere.
        tell: Called with (steps done, held-out loss).
    """
    task.network.eval()
    groups: list[dict[str, Any]] = [{"params": list(task.network.parameters()), "lr": rate}]
    return train(groups, task, schedule, folder=folder, tell=tell)


def record_of(history: History, network: nn.Module, rate: float, *, distilled: bool, name: str = "") -> dict[str, Any]:
    """What ``results.json`` says of a training."""
    return {
        "name": name, "trained_parameters": sum(each.numel() for each in network.parameters()), "learning_rate": rate, "distilled": distilled,
        "losses": history.losses, "held_out": history.held_out, "terms": history.terms, "best": history.best,
    }  # fmt: skip


def logits_of(network: nn.Module, pixels: UInt8[Tensor, "B c H W"]) -> Float[Tensor, "B C"]:
    """What a classifier says of images, in float32."""
    found: Tensor = network(pixel_values=seen_by(network, pixels)).logits
    return found.float()


@torch.no_grad()
def right(network: nn.Module, images: Images) -> Bool[Tensor, "N"]:
    """Which images of a set get their class."""
    return torch.cat([logits_of(network, pixels).argmax(-1).cpu() == labels for pixels, labels in in_parts(images)])
