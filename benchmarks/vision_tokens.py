"""Claim: patches that leave a vision state-space model cost least where every path is kept aligned and they go by what they write, before and after a short training; of PlainMamba it is not measured yet.

    python benchmarks/vision_tokens.py

Trains a small Vim and a small PlainMamba on Fashion-MNIST, once into the cache, and takes patches out of them until a share of the multiply-adds is saved: aligned or packed, by what patches write, by the published
score, at random, or merged; as they are, and after an equal short training towards the dense model. Measures the accuracy on all 10,000 test images. Adds to benchmarks/results/vision_tokens.csv after every
run; runs that stand there are left out. Training takes about 12 and 30 minutes of one core, a row half a minute, or three with its training.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from pydantic import ValidationError

import rows
from duramen.assets import cache_folder
from duramen.tokens.schedule import solve_keep
from duramen.train.schedule import Schedule
from duramen.vision import PlainMambaConfig, PlainMambaForImageClassification, VimConfig, VimForImageClassification
from duramen.vision.cost import patch_costs, sequence_length
from duramen.vision.images import open_images
from duramen.vision.patches import PatchReduction
from duramen.vision.train import Classification, right, train_classifier

SHAPE = {
    "hidden_size": 48,
    "num_hidden_layers": 6,
    "image_size": 28,
    "patch_size": 4,
    "num_channels": 1,
    "state_size": 4,
    "num_labels": 10,
}
MODELS = {
    "vim": (VimForImageClassification, VimConfig(**SHAPE), Schedule(600, batch=128, at_once=128, every=50)),
    "plainmamba": (
        PlainMambaForImageClassification, PlainMambaConfig(**SHAPE, stem=None, kernel_size=3), Schedule(400, batch=128, at_once=128, every=50),
    ),
}  # fmt: skip
RATE, AGAIN, RATE_AGAIN = 3e-3, Schedule(60, batch=128, at_once=128, every=30), 5e-4
CUTS = {20: (2, 3, 4), 30: (2, 3, 4), 40: (2, 3, 4), 50: (1, 2, 3, 4)}
"""Share of the multiply-adds to save, in per cent, and after which layers; the second half has no half to give."""
PACKED = {"gap_step": "hold", "aligned": False}
SUBJECTS = {
    "aligned": {},
    "packed": PACKED,
    "aligned, published score": {"score": "clip"},
    "packed, published score": {"score": "clip"} | PACKED,
    "merged, packed": {"kind": "merge"} | PACKED,
    "aligned, gaps held": {"gap_step": "hold"},
    "random, aligned": {"kind": "random"},
    "random, packed": {"kind": "random"} | PACKED,
    "aligned, after layers 1 and 3": {"sites": (1, 3)},
}


def main() -> None:
    """Trains the models and runs the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--cuts", nargs="*", type=int, default=list(CUTS))
    parser.add_argument("--subjects", nargs="*", default=list(SUBJECTS))
    parser.add_argument("--trained", action="store_true", help="also after an equal short training")
    options = parser.parse_args()
    table = rows.read("vision_tokens")
    test = open_images("fashion-mnist", "test", size=28, channels=1)
    for name in options.models:
        dense = trained(name)
        case = f"{name}, Fashion-MNIST"
        if not any(row["case"] == f"{case}, dense" for row in table):
            rows.add_accuracy("vision_tokens", table, f"{case}, dense", "dense", right(dense, test).numpy(), "aligned")
        for again in (False, True)[: 1 + options.trained]:
            for cut in options.cuts:
                here = f"{case}, {cut}% cut{' and trained' if again else ''}"
                for subject in options.subjects:
                    if any((row["case"], row["subject"]) == (here, subject) for row in table):
                        continue
                    try:
                        network = reduced(dense, cut, SUBJECTS[subject], again)
                    except ValidationError as error:  # merging joins at most half of the patches at a site
                        print(here, subject, error, flush=True)
                        continue
                    rows.add_accuracy("vision_tokens", table, here, subject, right(network, test).numpy(), "aligned")


def trained(name: str) -> torch.nn.Module:
    """A dense model, from the cache or made for it."""
    model, config, schedule = MODELS[name]
    place = cache_folder() / "trained" / f"{name}-fashion-mnist"
    if not (place / "model.safetensors").is_file():
        torch.manual_seed(0)
        network = model(config)
        train_classifier(
            _task(network), schedule, RATE, folder=place, tell=lambda step, loss: print(name, step, round(loss, 4), flush=True)
        )
        network.save_pretrained(place)
    return model.from_pretrained(place).eval()


def _task(network: torch.nn.Module, teacher: torch.nn.Module | None = None) -> Classification:
    """All training images but the last 2,000, which decide which checkpoint is best."""
    images = open_images("fashion-mnist", "train", size=28, channels=1)
    return Classification(network, images.part(torch.arange(58000)), images.part(torch.arange(58000, 60000)), teacher)


def reduced(dense: torch.nn.Module, cut: int, settings: dict[str, Any], again: bool) -> torch.nn.Module:
    """A copy that saves a share of the multiply-adds."""
    network = copy.deepcopy(dense)
    sites = settings.get("sites", CUTS[cut])
    keep = solve_keep(patch_costs(network), sites, cut / 100, tokens=sequence_length(network))
    network.config.reduction = settings | {"sites": sites, "keep": [keep]}
    PatchReduction.model_validate(network.config.reduction)
    if again:
        train_classifier(_task(network, dense), AGAIN, RATE_AGAIN)
    return network


if __name__ == "__main__":
    main()
