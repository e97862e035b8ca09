"""Evaluation on images: accuracy and images per second, beside the dense model where patches leave, and what leaves the first images."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from duramen.hardware.clock import repeated
from duramen.intervals import paired_interval, wilson_interval
from duramen.registry import Settings as MethodSettings
from duramen.registry import method
from duramen.vision.images import Images, seen_by
from duramen.vision.opening import positions_left, set_reduction, side, tokens_outside
from duramen.vision.studio import Studio
from duramen.vision.train import right

SHOWN = 8
"""Images of the test set that the report shows."""


class Settings(MethodSettings):
    """Settings of measuring."""

    batches: tuple[Annotated[int, Field(ge=1)], ...] = (1, 16)
    """Images at once, for each of which the speed is measured."""


@method("evaluate_images", title="Evaluation on images", paper="", kind="images", settings=Settings)
@torch.no_grad()
def apply(studio: Studio, settings: Settings) -> dict[str, Any]:
    """Accuracy on all test images, and images per second, of the model and, where patches leave, of the dense one beside it."""
    network = studio.model
    subjects = {"after": network} if studio.dense is None else {"before": studio.dense, "after": network}
    correct, speed = {}, {}
    for name, each in subjects.items():
        correct[name] = studio.memo(f"right-{name}", partial(_right, each, studio.test))
        speed[name] = studio.memo(f"speed-{name}", partial(_speed, each, studio.test, settings.batches))
    found: dict[str, Any] = {
        "images": len(studio.test.labels),
        "accuracy": {name: wilson_interval(np.array(each)).as_dict() for name, each in correct.items()},
        "speed": speed,
    }
    if "before" in correct:
        before, after = (np.array(correct[name], dtype=float) for name in ("before", "after"))
        found["change"] = paired_interval(before, after).as_dict()
    return found | {"shown": _shown(network, studio.test)}


def _right(network: nn.Module, images: Images) -> list[int]:
    found: list[int] = right(network, images).int().tolist()
    return found


def _speed(network: nn.Module, images: Images, batches: tuple[int, ...]) -> list[dict[str, float]]:
    """Images per second, by the number of them at once; median and range of five repeats."""
    found = []
    for batch in batches:
        pixels = seen_by(network, images.pixels([index % len(images.labels) for index in range(batch)]))
        rates = batch / repeated(lambda pixels=pixels: network(pixel_values=pixels))  # type: ignore[misc]
        found.append(
            {
                "batch": batch,
                "median": float(np.median(rates)),
                "low": float(rates.min()),
                "high": float(rates.max()),
            }
        )
    return found


def _shown(network: Any, images: Images) -> list[dict[str, Any]]:
    """Of the first images: pixels, class and answer, and after which layer every patch left; None for those that stayed."""
    chosen = list(range(min(SHOWN, len(images.labels))))
    pixels, outside = images.pixels(chosen), tokens_outside(network)
    reduction: dict[str, Any] | None = getattr(network.config, "reduction", None)
    seen = seen_by(network, pixels)
    answers, names = network(pixel_values=seen).logits.argmax(-1).tolist(), images.classes
    length = side(network) ** 2 + len(outside)
    left: list[dict[int, int]] = [{} for _ in chosen]
    for count in range(len(reduction["sites"]) if reduction else 0, 0, -1):
        assert reduction is not None
        keep = reduction["keep"] if len(reduction["keep"]) == 1 else reduction["keep"][:count]
        set_reduction(network, reduction | {"sites": reduction["sites"][:count], "keep": keep})
        for row, there in enumerate(positions_left(network, seen).tolist()):
            left[row] |= dict.fromkeys(set(range(length)) - set(there), reduction["sites"][count - 1])
    set_reduction(network, reduction)
    patches = [place for place in range(length) if place not in outside]
    return [
        {
            "pixels": each.tolist(), "class": names[int(images.labels[row])], "answer": names[answers[row]],
            "left_after": [left[row].get(place) for place in patches],
        }
        for row, each in enumerate(pixels)
    ]  # fmt: skip
