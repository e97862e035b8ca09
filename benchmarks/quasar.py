"""Claim: at a frame rate, rows of mixed widths lose less than uniform eight or four bits, than layers of mixed widths, and evolution less than chance at equal evaluations.

    python benchmarks/quasar.py

Trains a supernet on Fashion-MNIST, once into the cache, and searches it for three frame rates on the model of a ZCU102: those at which the largest network with eight bits everywhere would be 1.5, 2.5 and 4 times too slow.
Measures the accuracy on all 10,000 test images of what each search chose, with inherited weights and after an equal short training. Adds to benchmarks/results/quasar.csv after every run; runs that stand there are left out.
Training takes about 35 minutes of one core, a search about 2, its network's training 2.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import rows
from duramen.assets import cache_folder
from duramen.train.schedule import Schedule
from duramen.vision import ElasticViTForImageClassification
from duramen.vision.elastic import Architecture
from duramen.vision.images import Arrays, open_images
from duramen.vision.studio import Studio
from duramen.vision.supernet import Settings as SupernetSettings
from duramen.vision.supernet import apply as make_supernet
from duramen.vision.supernet import space_of
from duramen.vision.train import Classification, right, train_classifier
from duramen.vision.vit_search import Search, Settings, evolve, front, prepared, target_of

SLOWDOWNS = (1.5, 2.5, 4.0)
GENERATIONS, EACH, IMAGES = 4, 12, 500
EVOLVED = {"population": EACH, "parents": 6, "mutants": EACH // 2, "children": EACH // 2, "generations": GENERATIONS}
CHANCE = {"population": EACH * (GENERATIONS + 1), "generations": 0}
SUBJECTS = {
    "eight bits": EVOLVED | {"shares": (1.0,)},
    "rows of mixed widths": EVOLVED,
    "four bits": EVOLVED | {"shares": (0.0,)},
    "layers of mixed widths": EVOLVED | {"shares": (0.0, 1.0)},
    "rows of mixed widths, at random": CHANCE,
}
ALONE: dict[str, list[list[float]]] = {}
"""What every matrix of the supernet loses alone, the same for all searches."""
AGAIN, RATE_AGAIN = Schedule(60, batch=128, at_once=128, every=30), 3e-4


def main() -> None:
    """Trains the supernet and runs the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--slowdowns", nargs="*", type=float, default=list(SLOWDOWNS))
    parser.add_argument("--subjects", nargs="*", default=list(SUBJECTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--trained", action="store_true", help="also after an equal short training")
    options = parser.parse_args()
    table, sets = rows.read("quasar"), images()
    network, test = supernet(sets), open_images("fashion-mnist", "test", size=28, channels=1)
    space = space_of(network)
    for name in ("largest", "smallest"):
        if not any(row["subject"] == name for row in table):
            rows.add_accuracy(
                "quasar",
                table,
                "inherited, whole supernet",
                name,
                right(prepared(network, getattr(space, name), sets[0]), test).numpy(),
                "eight bits",
            )
    for slowdown in options.slowdowns:
        for subject in options.subjects:
            for seed in options.seeds:
                case = f"1/{slowdown} of the time" + (f" with seed {seed}" if seed else "")
                there = {row["case"] for row in table if row["subject"] == subject}
                if {f"inherited, {case}", *([f"trained, {case}"] if options.trained else [])} <= there:
                    continue
                found, chosen = searched(network, sets, slowdown, SUBJECTS[subject] | {"seed": seed})
                alone = prepared(network, Architecture.read(chosen["architecture"]), sets[0])
                if f"inherited, {case}" not in there:
                    figures = {"images per second, modelled": 1 / chosen["seconds"], "candidates": found}
                    rows.add_accuracy("quasar", table, f"inherited, {case}", subject, right(alone, test).numpy(), "eight bits")
                    for metric, value in figures.items():
                        table.append(
                            rows.row(f"inherited, {case}", metric, "1/s" if "second" in metric else "1", subject, value)
                        )
                if options.trained:
                    train_classifier(Classification(alone, *sets, network), AGAIN, RATE_AGAIN)
                    rows.add_accuracy("quasar", table, f"trained, {case}", subject, right(alone, test).numpy(), "eight bits")
                rows.write("quasar", table)


def images() -> tuple[Arrays, Arrays]:
    """All training images but the last 2,000, which decide what is chosen; and those."""
    whole = open_images("fashion-mnist", "train", size=28, channels=1)
    return whole.part(torch.arange(58000)), whole.part(torch.arange(58000, 60000))  # type: ignore[return-value]


def supernet(sets: tuple[Arrays, Arrays]) -> ElasticViTForImageClassification:
    """From the cache, or made for it."""
    place: Path = cache_folder() / "trained" / "supernet-fashion-mnist"
    if not (place / "model.safetensors").is_file():
        place.mkdir(parents=True, exist_ok=True)
        studio = Studio(
            None,
            None,
            *sets,
            sets[1],
            memo=lambda _, compute: compute(),
            folder=place,
            out=place,
            told=lambda *said: print(*said, flush=True),
        )
        make_supernet(studio, SupernetSettings(every=25))
        studio.model.save_pretrained(place)
    return ElasticViTForImageClassification.from_pretrained(place).eval()


def searched(
    network: ElasticViTForImageClassification, sets: tuple[Arrays, Arrays], slowdown: float, given: dict[str, object]
) -> tuple[int, dict]:
    """How many candidates were compared, and the chosen one."""
    space = space_of(network)
    settings = Settings(target=1, images=IMAGES, **given)
    target = target_of(settings, network, space, lambda name, compute: compute())
    most = target.seconds(space.largest.parts(network.config)) / slowdown
    if settings.shares:
        space = space.model_copy(update={"shares": settings.shares})
    search = Search(network, space, target, most, *sets, settings)
    kept = {} if "alone" not in ALONE else {"alone": ALONE["alone"]}
    tried = evolve(
        search,
        lambda name, compute: kept.get(name) or compute(),
        lambda number, loss: print(number, round(loss, 4), flush=True),
    )
    ALONE["alone"] = search.losses
    return len(tried), front(tried)[-1]


if __name__ == "__main__":
    main()
