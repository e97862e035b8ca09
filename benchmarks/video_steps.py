"""Claim, not measured yet on a model whose videos look like those that it was trained on: no fixed schedule of full steps is nearest everywhere; the one that calibration chooses is never measurably further from the full run than plain fewer steps.

    python benchmarks/train_video.py sprites out/sprites
    python benchmarks/video_steps.py out/sprites

Runs a trained pipeline (AnimateDiff, DDIM, 25 steps, without guidance) with 13, 9 and 7 full steps: even ones, which are plain fewer steps; by the published threshold; by what the solver makes of a stale prediction; each keeping
predictions or carrying them on; by DeepCache's rule (only the outer level runs, on even steps); and as calibration chooses. Schedules are learned on four videos, chosen on eight others, and measured on eight more: PSNR to the full run, and how much they move of what
it moves. Adds to benchmarks/results/video_steps.csv after every run; runs that stand there are left out. About fifteen minutes of a core a model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rows
from duramen.hardware.machine import fastest_device
from duramen.intervals import mean_interval
from duramen.override import override
from duramen.video.calibrate import EVEN, candidates, choose_schedule, predictions
from duramen.video.rehash import Rehash
from duramen.video.schedules import uniform_schedule

STEPS, COUNTS, BATCH = 25, (13, 9, 7), 4
LEARN, CHOOSE, MEASURE = [0], [1, 2], [3, 4]
"""Seeds of batches."""
PROMPTS = {
    "sprites": ["a red coat", "a green bag", "a blue sneaker", "a white dress"],
    "discs": ["a red disc", "a green disc", "a blue disc", "a white disc"],
}
Schedule = tuple[list[int], int]


def main() -> None:
    """Runs the table."""
    from diffusers import AnimateDiffPipeline

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--counts", nargs="*", type=int, default=list(COUNTS))
    options = parser.parse_args()
    pipeline = AnimateDiffPipeline.from_pretrained(options.folder).to(fastest_device())
    pipeline.set_progress_bar_config(disable=True)
    name = next(kind for kind in PROMPTS if kind in options.folder.name)
    generate = partial(latents, pipeline, PROMPTS[name])
    full = {seed: videos(pipeline, generate(seed)) for seed in MEASURE}
    spread = float(torch.cat([generate(seed) for seed in LEARN]).std())
    print(name, "deviation of latents, which are scaled to 1:", round(spread, 3), flush=True)
    learned = predictions(pipeline, generate, STEPS, LEARN)
    for count in options.counts:
        case = f"{name}, {count} of {STEPS} steps"
        for subject, run in subjects(pipeline, generate, learned, count).items():
            table = rows.read("video_steps")
            if any((row["case"], row["subject"]) == (case, subject) for row in table):
                continue
            with run() as said:
                found = {seed: videos(pipeline, generate(seed)) for seed in MEASURE}
            figures = measured(full, found)
            print(case, subject, said, {metric: round(value.value, 3) for metric, value in figures.items()}, flush=True)
            for metric, value in figures.items():
                peer = rows.peer_of(table, case, metric, EVEN)
                more = {"low": value.low, "high": value.high, "samples": value.samples} | rows.beside(peer)
                unit = "dB" if metric == "PSNR to the full run" else "1"
                table.append(rows.row(case, metric, unit, subject, value.value, **more))
            rows.write("video_steps", table)


@torch.no_grad()
def latents(pipeline: Any, prompts: list[str], seed: int) -> Tensor:
    """A batch of videos before decoding, [N, C, T, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    found: Tensor = pipeline(
        prompts, num_frames=8, num_inference_steps=STEPS, guidance_scale=1.0, generator=generator, output_type="latent"
    ).frames
    return found


@torch.no_grad()
def videos(pipeline: Any, found: Tensor) -> Tensor:
    """Decoded, [N, C, T, H, W] from 0 to 1."""
    return (pipeline.decode_latents(found) / 2 + 0.5).clamp(0, 1).double()


def measured(full: dict[int, Tensor], found: dict[int, Tensor]) -> dict[str, Any]:
    """Figures over all videos."""
    whole, mine = (torch.cat([part[seed] for seed in MEASURE]) for part in (full, found))
    error = (whole - mine).square().flatten(1).mean(1).clamp_min(1e-12)
    moves = [part.diff(dim=2).abs().flatten(1).mean(1) for part in (mine, whole)]
    return {
        "PSNR to the full run": mean_interval((-10 * error.log10()).numpy()),
        "motion of the full run": mean_interval((moves[0] / moves[1]).numpy()),
    }


def subjects(pipeline: Any, generate: Callable[[int], Tensor], learned: Tensor, count: int) -> dict[str, Callable[[], Any]]:
    """What each does while it is entered."""
    found: dict[str, Callable[[], Any]] = {
        name: partial(rehashed, pipeline, lambda mine=mine: mine) for name, mine in candidates(pipeline, learned, count).items()
    }
    found["outer level on even steps"] = partial(outer_level, pipeline, uniform_schedule(STEPS, count))

    def chosen() -> Schedule:
        choice = choose_schedule(pipeline, generate, STEPS, count, learn=LEARN, choose=CHOOSE)
        print(
            "chosen:", choice.name, {name: round(float(np.mean(each)), 4) for name, each in choice.errors.items()}, flush=True
        )
        return choice.full, choice.order

    found["calibrated"] = partial(rehashed, pipeline, chosen)
    return found


@contextmanager
def rehashed(pipeline: Any, schedule: Callable[[], Schedule]) -> Iterator[list[int]]:
    """The denoiser runs on some steps."""
    full, order = schedule()
    handle = Rehash(pipeline, full, STEPS, order=order)
    yield full
    handle.remove()


@contextmanager
def outer_level(pipeline: Any, full: list[int]) -> Iterator[list[int]]:
    """DeepCache: on the other steps the inner levels give what they gave, and the outer one runs."""
    unet, step, kept = pipeline.unet, [-1], {}
    inner = [*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]]

    def count(before: Callable[..., Any], *args: Any, **options: Any) -> Any:
        step[0] = (step[0] + 1) % STEPS
        return before(*args, **options)

    def deep(number: int, before: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if step[0] in full:
            kept[number] = before(*args, **options)
        return kept[number]

    undo = [override(unet, partial(count, unet.forward))]
    undo += [override(block, partial(deep, number, block.forward)) for number, block in enumerate(inner)]
    yield full
    for each in undo:
        each()


if __name__ == "__main__":
    main()
