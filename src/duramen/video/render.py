"""A video from a pipeline's folder, within some memory and with as few full steps as were asked for; what was planned, chosen and measured stands beside it.

Nothing is written under its own name before it is whole. The schedule of full steps is kept in the folder, and taken again where pipeline and steps are the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duramen.finite import all_finite
from duramen.hardware.machine import describe, fastest_device
from duramen.intervals import paired_interval
from duramen.problem import Exit, Problem
from duramen.reading import read_json, reading
from duramen.rundir import replacing, write_json
from duramen.video.calibrate import Choice, choose_schedule
from duramen.video.plan import Clip, Plan, streamline_within
from duramen.video.rehash import Rehash
from duramen.video.schedules import check_count
from duramen.video.streamline import Streamlined, need_diffusers
from duramen.video.text import quantize_text_encoder

LEARN, CHOOSE = 2, 6
"""Seeds that schedules are learned on, and others that choose; none of them is the seed of a video below 1,000,000."""
FIRST_SEED = 1_000_000
GUIDED = {
    "AnimateDiffPipeline": True, "StableVideoDiffusionPipeline": True, "WanPipeline": False, "LTXPipeline": True, "CogVideoXPipeline": True,
    "HunyuanVideoPipeline": False,
}  # fmt: skip
"""Pipelines that are known, and whether they run both branches of guidance at once."""
USUAL = {"WanPipeline": (81, 480, 832), "LTXPipeline": (161, 512, 704), "HunyuanVideoPipeline": (129, 720, 1280)}
"""Frames, height and width that pipelines make by themselves, where no configuration says it."""
FACTORS = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
"""Where pipelines keep how many pixels of a side a latent stands for."""
FRAMES = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
"""Where pipelines keep how many frames a latent behind the first stands for; otherwise it is one."""
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Wish:
    """What is to be made.

    Attributes:
        prompt: Of pipelines that read one.
        image: File of the first frame, of pipelines that begin with one.
        frames: None for what the pipeline takes by itself; so for the sizes.
        height: Pixels.
        width: Pixels.
        steps: Denoising steps.
        full: Steps on which the denoiser runs; None for all of them.
        quality: In the place of ``full``: decibels that a full run must stand above the distance from it.
        memory: Bytes for activations; None for whatever it takes.
        seed: Of the noise.
        quantize_text: Whether the text encoder's weights are held in eight bits.
    """

    prompt: str = ""
    image: str = ""
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int = 25
    full: int | None = None
    memory: int | None = None
    seed: int = 0
    quantize_text: bool = False
    quality: float | None = None


def render(folder: Path, out: Path, wish: Wish, tell: Tell = lambda said: None) -> dict[str, Any]:
    """Makes a video: ``video.gif`` and, with imageio's ffmpeg, ``video.mp4``; ``video.json`` and ``report.html`` beside them.

    Args:
        folder: Of a pipeline of diffusers.
        out: Where to write.
        wish: What is to be made.
        tell: Called with what happens.

    Returns:
        The content of ``video.json``.

    Raises:
        Problem: On an unknown pipeline, a budget that cannot be met, or latents that are not finite.
    """
    from duramen.report.video import write_video_report

    pipeline = open_pipeline(folder)
    studio = _Studio(pipeline, wish, tell)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Problem(
            f"{out} cannot be a folder: {error.strerror}.", why="the video goes into it.", fix="choose another OUT folder."
        ) from None
    text = quantize_text_encoder(pipeline, wish.prompt) if wish.quantize_text else None
    plans: list[Plan] = []
    handle: Streamlined | None = None
    if wish.memory is not None:
        tell("planning")
        handle, plans = streamline_within(pipeline, studio.clip, wish.memory)
    choice = None if wish.full is None and wish.quality is None else _schedule(studio, folder, out)
    begun = time.perf_counter()
    with Rehash(pipeline, choice.full, wish.steps, order=choice.order) if choice else contextlib.nullcontext():
        images = studio.images()
    seconds = time.perf_counter() - begun
    if handle is not None:
        handle.remove()
    files = write_video(images, out)
    results = {
        "schema": "duramen-video/1", "pipeline": str(folder), "class": type(pipeline).__name__, "wish": asdict(wish), "clip": asdict(studio.clip), "files": files,
        "frames": len(images), "seconds": seconds, "denoised": wish.steps if choice is None else len(choice.full), "machine": describe(),
        "plans": [_planned(network, plan) for network, plan in zip(handle.networks if handle else [], plans, strict=True)],
        "schedule": None if choice is None else _chosen(choice), "text_encoder": text,
    }  # fmt: skip
    write_json(out / "video.json", results)
    write_video_report(out, results, images, [(plan.whole.curve, plan.sliced.curve) for plan in plans])
    tell(f"done: {out / 'report.html'}")
    return results


def open_pipeline(folder: Path) -> Any:
    """A pipeline on the fastest device, in half precision where that is a GPU.

    Raises:
        Problem: If there is none, or one that is not known.
    """
    need_diffusers()
    file = folder / "model_index.json"
    if not file.is_file():
        raise Problem(
            f"{folder} is no pipeline of diffusers.",
            why="it has no model_index.json.",
            fix="the folder that `pipeline.save_pretrained` wrote.",
        )
    name = str(read_json(file).get("_class_name", ""))
    if name not in GUIDED:
        raise Problem(
            f"A {name or 'pipeline without a name'} is not known.",
            why="its networks or its latents are others.",
            fix=f"one of {', '.join(GUIDED)}.",
            code=Exit.INCOMPATIBLE,
        )
    import diffusers

    device = fastest_device()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    with reading(folder):
        pipeline = getattr(diffusers, name).from_pretrained(folder, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class _Studio:
    """A pipeline with what is asked of it."""

    def __init__(self, pipeline: Any, wish: Wish, tell: Tell) -> None:
        self.pipeline, self.wish, self.tell = pipeline, wish, tell
        name = type(pipeline).__name__
        factor = _kept(pipeline, FACTORS)
        frames, height, width = (
            mine or usual for mine, usual in zip((wish.frames, wish.height, wish.width), _usual(pipeline, factor), strict=True)
        )
        side, apart = factor * _patch(pipeline), _kept(pipeline, FRAMES, 1)
        if height % side or width % side or frames < 1 or (frames - 1) % apart:
            near = (frames - 1) // apart * apart + 1
            raise Problem(
                f"{frames} frames of {width}x{height} pixels cannot be.", why=f"a token stands for {side} by {side} pixels, and {apart} frames behind the first for one.",
                fix=f"sides that {side} divides, and {near} or {near + apart} frames.",
            )  # fmt: skip
        if wish.quality is not None and not 0 < wish.quality < math.inf:
            raise Problem(
                f"{wish.quality:g} dB are no quality.",
                why="at 0 the error is as large as the video itself.",
                fix="`--quality 25`",
            )
        most = pipeline.scheduler.config.num_train_timesteps
        if wish.steps > most:
            raise Problem(
                f"{wish.steps} denoising steps cannot be.", why=f"the model learned {most} times.", fix=f"1 to {most}."
            )
        if wish.quality is not None and wish.full is not None:
            raise Problem("Full steps and a quality do not go together.", why="each follows from the other.", fix="`--full` or `--quality`.")  # fmt: skip
        if wish.full is not None:
            check_count(wish.steps, wish.full)
        per_token = bool(getattr(pipeline.config, "expand_timesteps", False))
        self.clip = Clip(height, width, frames, GUIDED[name], factor, apart, per_token)
        self.asked: dict[str, Any] = {"height": height, "width": width, "num_frames": frames, "num_inference_steps": wish.steps}
        if name == "StableVideoDiffusionPipeline":
            self.asked |= {"image": _first_frame(wish, width, height), "decode_chunk_size": frames}
        else:
            self.asked |= {"prompt": wish.prompt}

    def latents(self, seed: int) -> Tensor:
        """What the pipeline makes of a seed, before it is decoded."""
        return self._ran(seed, "latent", "")  # type: ignore[no-any-return]

    def images(self) -> list[Any]:
        """The frames."""
        found: list[Any] = self._ran(self.wish.seed, "pil", "video")
        return found

    def _ran(self, seed: int, kind: str, what: str) -> Any:
        generator = torch.Generator("cpu").manual_seed(seed)
        watch = partial(_watched, tell=self.tell if what else lambda said: None, steps=self.wish.steps)
        return self.pipeline(**self.asked, generator=generator, output_type=kind, callback_on_step_end=watch).frames[0]


def _kept(pipeline: Any, names: tuple[str, ...], *otherwise: int) -> int:
    """What a pipeline keeps under one of some names."""
    return int(next((getattr(pipeline, each) for each in names if hasattr(pipeline, each)), *otherwise))


def _patch(pipeline: Any) -> int:
    """Latents of a side that go into one token of the denoiser."""
    found = getattr(getattr(pipeline, "transformer", None), "config", {}).get("patch_size", 1)
    return int(found[-1] if isinstance(found, list | tuple) else found)


def _usual(pipeline: Any, factor: int) -> tuple[int, int, int]:
    """Frames, height and width where nothing is said."""
    name = type(pipeline).__name__
    if name == "AnimateDiffPipeline":
        side = pipeline.unet.config.sample_size * factor
        return 16, side, side
    if name == "StableVideoDiffusionPipeline":
        return pipeline.unet.config.num_frames, 576, 1024
    if name == "CogVideoXPipeline":
        config = pipeline.transformer.config
        return config.sample_frames, config.sample_height * factor, config.sample_width * factor
    return USUAL[name]


def _watched(pipeline: Any, step: int, timestep: Any, given: dict[str, Tensor], *, tell: Tell, steps: int) -> dict[str, Tensor]:
    """Stops at the first step after which latents are not finite."""
    if not all_finite(given["latents"]):
        raise Problem(
            f"Latents are not finite after step {step + 1} of {steps}.", why="half precision overflowed, or the weights are damaged.",
            fix="other weights, or a processor, which computes in single precision.", code=Exit.CHECK_FAILED,
        )  # fmt: skip
    tell(f"step {step + 1}/{steps}")
    return given


def _first_frame(wish: Wish, width: int, height: int) -> Any:
    from PIL import Image, UnidentifiedImageError

    if not wish.image:
        raise Problem("This pipeline begins with an image.", why="it makes it move.", fix="`--image FILE`")
    try:
        return Image.open(wish.image).convert("RGB").resize((width, height))
    except (OSError, UnidentifiedImageError) as error:
        raise Problem(f"{wish.image} is no image that can be read.", why=str(error), fix="a png or jpeg.") from None


def _schedule(studio: _Studio, folder: Path, out: Path) -> Choice:
    """The schedule for so many full steps: that of an earlier run, or learned and chosen now."""
    wish, file = studio.wish, out / "schedule.json"
    asked = {name: value for name, value in studio.asked.items() if name != "image"}
    key = hashlib.sha256(
        (_identity(folder) + json.dumps([asked, wish.image, wish.full, wish.quantize_text, wish.quality])).encode()
    ).hexdigest()
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):  # a damaged one is as good as none
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept.pop("key", "") == key:
            return Choice(**kept)
    what = f"steps for {wish.quality:g} dB" if wish.full is None else f"{wish.full} of {wish.steps} steps"
    rounds = 1 if wish.quality is None else math.ceil(math.log2(wish.steps))
    studio.tell(f"choosing {what}: {LEARN + (1 + 6 * rounds) * CHOOSE} videos without decoding")
    learn = range(FIRST_SEED, FIRST_SEED + LEARN)
    choose = range(FIRST_SEED + LEARN, FIRST_SEED + LEARN + CHOOSE)
    choice = choose_schedule(
        studio.pipeline, studio.latents, wish.steps, wish.full, quality=wish.quality, learn=list(learn), choose=list(choose)
    )
    write_json(file, asdict(choice) | {"key": key})
    return choice


def _identity(folder: Path) -> str:
    """What tells pipelines apart without reading all of their weights: names, sizes and dates of files, and the configurations."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    said = [f"{file.relative_to(folder)} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return "\n".join(said + [file.read_text(encoding="utf-8") for file in files if file.suffix == ".json"])


def write_video(images: list[Any], out: Path) -> list[str]:
    """Writes frames as ``video.gif``, and as ``video.mp4`` where there is ffmpeg; each appears when it is whole.

    Args:
        images: Frames, as PIL has them.
        out: Folder.
    """
    made = ["video.gif"]
    with replacing(out / "video.gif") as file:
        images[0].save(file, "gif", save_all=True, append_images=images[1:], duration=125, loop=0)
    if find_spec("imageio") is not None and find_spec("imageio_ffmpeg") is not None:
        import imageio.v3

        frames = np.stack([np.asarray(image) for image in images])
        with replacing(out / "video.mp4") as file:
            imageio.v3.imwrite(file, frames, extension=".mp4", fps=8, macro_block_size=2, output_params=["-f", "mp4"])
        made.append("video.mp4")
    return made


def _planned(network: Any, plan: Plan) -> dict[str, Any]:
    return {"network": type(network).__name__, "piece": plan.slices.piece, "peak": plan.peak, "plain": plan.plain}


def _chosen(choice: Choice) -> dict[str, Any]:
    """What was chosen, with its distance from the full run and from that of even steps, both over the seeds that chose."""
    mine, even = (np.array(choice.errors[name]) for name in (choice.name, "even"))
    apart = paired_interval(even, mine)
    return asdict(choice) | {
        "error": float(mine.mean()),
        "from_even": {"value": apart.value, "low": apart.low, "high": apart.high},
    }
