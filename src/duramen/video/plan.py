"""How small the slices of a video have to be to fit into some memory: the network is run with tensors that have shapes and no data, and the ledger says what would be alive.

The prediction needs no weights, no accelerator, and seconds to a minute; what it counts is what a real run counts, to the byte.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from duramen.hardware.machine import bytes_told
from duramen.problem import Exit, Problem
from duramen.video.ledger import Ledger, counted
from duramen.video.slices import Slices
from duramen.video.streamline import Streamlined, known_networks

AT_ONCE = 16
"""Images that a pipeline of AnimateDiff decodes together."""
WHOLE = ("AutoencoderKLWan", "AutoencoderKLLTXVideo", "AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo")
"""Decoders that run as they are."""
HUNYUAN_TEXT = 256
"""Tokens of text that HunyuanVideo's pipelines give its transformer."""
USUALLY_APART = {"Wan": 4, "LTX": 8, "CogVideoX": 4, "HunyuanVideo": 4}
"""Frames that a latent behind the first stands for, by what a network's class is called."""
LADDER = (None, *(size * 2**20 for size in (512, 256, 128, 96, 64, 32, 16, 8)))
"""Sizes of slices in bytes, from the largest on; smaller ones start many more operators and save next to nothing, since features themselves are what is left."""


@dataclass(frozen=True)
class Clip:
    """What is to be made.

    Attributes:
        height: Pixels.
        width: Pixels.
        frames: Of the video.
        guided: Whether both branches of guidance run at once; pipelines of Wan run one after the other anyway.
        factor: Pixels of a side that a latent stands for.
        apart: Frames that a latent behind the first stands for; None for as many as usual with the network, 8 of LTX-Video and 4 of other transformers.
        per_token: Whether every token is given a time of its own, as by pipelines of Wan with ``expand_timesteps``.
    """

    height: int
    width: int
    frames: int
    guided: bool = True
    factor: int = 8
    apart: int | None = None
    per_token: bool = False


@dataclass(frozen=True)
class Plan:
    """How a network fits.

    Attributes:
        slices: What it takes.
        sliced: The account of one pass, predicted.
        whole: The same without slices.
    """

    slices: Slices
    sliced: Ledger
    whole: Ledger

    @property
    def peak(self) -> int:
        """Bytes of activations at most."""
        return self.sliced.peak

    @property
    def plain(self) -> int:
        """The same without slices."""
        return self.whole.peak


def predict(network: Any, clip: Clip, slices: Slices | None, change: Callable[[Any], None] = lambda copy: None) -> Ledger:
    """The account of one pass of a network for a clip, with tensors that hold no data.

    Args:
        network: A UNet of Stable Video Diffusion or AnimateDiff, the transformer of Wan, LTX-Video, CogVideoX or HunyuanVideo, or an autoencoder; only its config and type are used.
        clip: Its sizes.
        slices: How large they are; None for its own way.
        change: Done to the copy before it runs, such as options of its own.

    Raises:
        Problem: If the network is none of these.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    dtype, before = _dtype_of(network), torch.get_default_dtype()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        torch.set_default_dtype(dtype)
        try:
            copy: nn.Module = type(network).from_config(network.config).eval()
        finally:
            torch.set_default_dtype(before)
        for name, parameter in copy.named_parameters():
            if any(each in name.split(".") for each in getattr(network, "_keep_in_fp32_modules", None) or ()):
                parameter.data = parameter.data.float()
        change(copy)
        run = example(copy, clip)
        handle = None if slices is None else Streamlined([copy], slices)
        with counted(copy) as ledger:
            run()
        if handle is not None:
            handle.remove()
    return ledger


def example(network: Any, clip: Clip) -> Callable[[], Any]:
    """A pass of a network at a clip's sizes, on random inputs.

    Raises:
        Problem: If the network is none that ``predict`` knows.
    """
    name, branches = type(network).__name__, 2 if clip.guided else 1
    config, height, width = network.config, clip.height // clip.factor, clip.width // clip.factor
    usual = next((apart for family, apart in USUALLY_APART.items() if family in name), 1)
    latents = (clip.frames - 1) // (clip.apart or usual) + 1
    like = torch.empty(0, dtype=_dtype_of(network), device=next(network.parameters()).device)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=like.dtype, device=like.device)

    if name == "UNetSpatioTemporalConditionModel":
        x = some(branches, clip.frames, config.in_channels, height, width)
        looked = some(branches, 1, _first(config.cross_attention_dim))
        numbers = some(branches, config.projection_class_embeddings_input_dim // config.addition_time_embed_dim)
        return partial(network, x, some(), looked, numbers)
    if name == "UNetMotionModel":
        x = some(branches, config.in_channels, clip.frames, height, width)
        looked = some(branches * clip.frames, 77, _first(config.cross_attention_dim))
        return partial(network, x, some(), looked)
    if name == "AutoencoderKLTemporalDecoder":
        return partial(network.decode, some(clip.frames, config.latent_channels, height, width), num_frames=clip.frames)
    if name == "AutoencoderKL":
        return partial(network.decode, some(min(clip.frames, AT_ONCE), config.latent_channels, height, width))
    if name == "AutoencoderKLWan":
        return partial(network.decode, some(1, config.z_dim, latents, height, width))
    if name == "AutoencoderKLLTXVideo":
        x = some(1, config.latent_channels, latents, height, width)
        return partial(network.decode, x, some(1)) if config.timestep_conditioning else partial(network.decode, x)
    if name in ("AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo"):
        return partial(network.decode, some(1, config.latent_channels, latents, height, width))
    if name == "CogVideoXTransformer3DModel":
        latents += -latents % (config.patch_size_t or 1)
        tokens = latents // (config.patch_size_t or 1) * (height // config.patch_size) * (width // config.patch_size)
        turns = (torch.ones(tokens, config.attention_head_dim, device=like.device),) * 2
        x = some(branches, latents, config.in_channels, height, width)
        looked = some(branches, config.max_text_seq_length, config.text_embed_dim)
        time = torch.ones(branches, dtype=torch.long, device=like.device)
        return partial(network, x, looked, time, image_rotary_emb=turns if config.use_rotary_positional_embeddings else None)
    if name == "HunyuanVideoTransformer3DModel":
        x = some(branches, config.in_channels, latents, height, width)
        looked = some(branches, HUNYUAN_TEXT, config.text_embed_dim)
        mask = torch.ones(branches, HUNYUAN_TEXT, dtype=torch.long, device=like.device)
        time = torch.ones(branches, dtype=torch.long, device=like.device)
        guidance = some(branches) if config.guidance_embeds else None
        return partial(network, x, time, looked, mask, some(branches, config.pooled_projection_dim), guidance)
    if name == "WanTransformer3DModel":
        x = some(1, config.in_channels, latents, height, width)
        tokens = x.shape[2] * x.shape[3] * x.shape[4] // math.prod(config.patch_size)
        time = (
            torch.ones(1, tokens, device=like.device) if clip.per_token else torch.ones(1, dtype=torch.long, device=like.device)
        )
        return partial(network, x, time, some(1, 512, config.text_dim))
    if name == "LTXVideoTransformer3DModel":
        x, mask = some(branches, latents * height * width, config.in_channels), torch.ones(branches, 128, device=like.device)
        time, looked = torch.ones(branches, device=like.device), some(branches, 128, config.caption_channels)
        return partial(network, x, looked, time, mask, latents, height, width)
    raise Problem(
        f"The memory of a {name} cannot be predicted.", why="what it is given is not known.", fix="the UNet or the temporal decoder of a pipeline.",
        code=Exit.INCOMPATIBLE,
    )  # fmt: skip


def _dtype_of(network: nn.Module) -> torch.dtype:
    """That of most of its parameters; some networks keep a few in float32."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in network.parameters():
        counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0]


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


def plan(network: Any, clip: Clip, memory: int, *, donate: bool = True) -> Plan:
    """The largest slices with which a network's activations fit, which take the least time.

    Args:
        network: As for ``predict``.
        clip: Its sizes.
        memory: Bytes.
        donate: As for ``streamline``.

    Raises:
        Problem: If they do not fit with any, with what holds most of it then.
    """
    plain = predict(network, clip, None)
    low, high, found = 0, len(LADDER) - 1, {}
    while low <= high:
        middle = (low + high) // 2
        slices = Slices(LADDER[middle], donate)
        found[middle] = predict(network, clip, slices)
        low, high = (low, middle - 1) if found[middle].peak <= memory else (middle + 1, high)
    if low == len(LADDER):
        least = found[len(LADDER) - 1]
        holds = ", ".join(f"{name} {bytes_told(size)}" for name, size in least.at_peak[:3])
        raise Problem(
            f"{bytes_told(memory)} are too few for the activations of a {type(network).__name__} at {clip.frames} frames of {clip.width}x{clip.height}.",
            why=f"with the smallest slices it takes {bytes_told(least.peak)} ({bytes_told(plain.peak)} without any), and holds {holds}.",
            fix=f"at least {bytes_told(least.peak)}, fewer frames, or guidance branch by branch.",
            code=Exit.OUT_OF_BUDGET,
        )
    return Plan(Slices(LADDER[low], donate), found[low], plain)


def streamline_within(pipeline: Any, clip: Clip, memory: int) -> tuple[Streamlined, list[Plan]]:
    """Makes the networks of a pipeline run within some memory, each by a plan of its own.

    Args:
        pipeline: As for ``streamline``.
        clip: What is to be made.
        memory: Bytes for activations of the denoiser, and of the decoder, which run one after the other.

    Raises:
        Problem: As ``plan``, or if nothing in the pipeline is known.
    """
    networks = known_networks(pipeline)
    plans = [plan(network, clip, memory) for network in networks]
    for each in getattr(pipeline, "components", {}).values():
        if type(each).__name__ in WHOLE:
            _check_whole(each, clip, memory)
    return Streamlined(networks, [each.slices for each in plans]), plans


def _check_whole(decoder: Any, clip: Clip, memory: int) -> None:
    """Stops if a decoder that runs as it is takes more."""
    found = predict(decoder, clip, None).peak
    if found > memory:
        raise Problem(
            f"{bytes_told(memory)} are too few for the activations of an {type(decoder).__name__} at {clip.frames} frames of {clip.width}x{clip.height}.",
            why=f"it takes {bytes_told(found)}, and runs as it is: its blocks are none that run in slices.",
            fix=f"at least {bytes_told(found)}, or fewer frames.",
            code=Exit.OUT_OF_BUDGET,
        )
