"""Makes a stock pipeline of diffusers run in little memory, and gives it its own way back.

Blocks of its UNet and of its temporal decoder run by ``duramen.video.unet`` as long as the handle is there; weights, class and everything else stay as they are. With gradients, FreeU or image adapters a block runs its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from duramen.override import override
from duramen.problem import Exit, Problem, need
from duramen.video import dit, unet
from duramen.video.slices import Slices

PIECE = 64 * 2**20
"""Bytes."""
MARK = "_duramen_streamlined"
PROGRAMS: dict[str, Callable[..., Any]] = {
    "DownBlockSpatioTemporal": unet.svd_down, "CrossAttnDownBlockSpatioTemporal": unet.svd_down, "UNetMidBlockSpatioTemporal": unet.svd_mid,
    "UpBlockSpatioTemporal": unet.svd_up, "CrossAttnUpBlockSpatioTemporal": unet.svd_up,
    "TemporalDecoder": unet.temporal_decoder,
    "DownBlockMotion": unet.motion_down, "CrossAttnDownBlockMotion": unet.motion_down, "UNetMidBlockCrossAttnMotion": unet.motion_mid,
    "UpBlockMotion": unet.motion_up, "CrossAttnUpBlockMotion": unet.motion_up,
}  # fmt: skip
"""By the class of a block."""
OWN_WAY: dict[str, Callable[..., Any]] = {
    "WanTransformerBlock": dit.wan_block, "LTXVideoTransformerBlock": dit.ltx_block, "CogVideoXBlock": dit.cogvideox_block,
    "HunyuanVideoTransformerBlock": dit.hunyuan_block, "HunyuanVideoSingleTransformerBlock": dit.hunyuan_block,
    "HunyuanVideoTokenReplaceTransformerBlock": dit.hunyuan_block, "HunyuanVideoTokenReplaceSingleTransformerBlock": dit.hunyuan_block,
    "FeedForward": unet.feed_forward,
}  # fmt: skip
"""Modules whose programs run their own forward, which is given first."""
BLOCKS = {*PROGRAMS, *OWN_WAY} - {"FeedForward"}
"""By which a network is known."""
IMAGES = "AutoencoderKL"
"""A decoder of single images, which is told to take them one by one; that is exact."""
TAILS = ("UNetSpatioTemporalConditionModel", "UNetMotionModel")
"""Networks that end in a norm of images, an activation and a convolution, of which the first two can be done in place."""


class Streamlined:
    """A pipeline that runs in slices, until ``remove``.

    Args:
        networks: What is to be changed.
        slices: How large, each or all.
    """

    def __init__(self, networks: list[nn.Module], slices: Slices | Sequence[Slices]) -> None:
        self.networks = networks
        self._undo: list[Callable[[], None]] = []
        for network in networks:
            if MARK in network.__dict__:
                raise Problem(
                    f"The {type(network).__name__} is streamlined already.",
                    why="its blocks would be replaced twice.",
                    fix="`remove()` of the first handle.",
                )
        every = [slices] * len(networks) if isinstance(slices, Slices) else slices
        for network, mine in zip(networks, every, strict=True):
            network.__dict__[MARK] = self
            if type(network).__name__ == IMAGES and mine.piece is not None:
                self._undo.append(partial(setattr, network, "use_slicing", network.use_slicing))
                network.enable_slicing()  # type: ignore[operator]
            for module in network.modules():
                program = PROGRAMS.get(type(module).__name__)
                if type(module).__name__ in OWN_WAY:
                    program = partial(OWN_WAY[type(module).__name__], module.forward)
                if program is not None:
                    self._undo.append(override(module, partial(_run, module, module.forward, program, mine)))
                elif type(module).__name__ in TAILS:
                    tail: Any = module
                    for each in (tail.conv_norm_out, tail.conv_act):
                        self._undo.append(override(each, partial(_run_in_place, each.forward, mine)))

    def remove(self) -> None:
        """Gives every block its own way back."""
        while self._undo:
            self._undo.pop()()
        for network in self.networks:
            network.__dict__.pop(MARK, None)


def streamline(pipeline: Any, *, piece: int = PIECE, donate: bool = True) -> Streamlined:
    """Makes a pipeline, or a network of one, run in slices.

    Args:
        pipeline: Of diffusers, with a UNet of Stable Video Diffusion or AnimateDiff or the transformer of Wan, LTX-Video, CogVideoX or HunyuanVideo; or such a network, or a temporal decoder's autoencoder.
        piece: Bytes of a feature that run together.
        donate: Whether features that nobody reads any more are freed although the pipeline still points to them.

    Raises:
        Problem: If nothing in it is known, or it is streamlined already.
    """
    return Streamlined(known_networks(pipeline), Slices(piece, donate))


def need_diffusers() -> None:
    """Stops where it is not installed.

    Raises:
        Problem: Then.
    """
    need("Video", "diffusers", install="diffusers imageio[ffmpeg]")


def known_networks(pipeline: Any) -> list[nn.Module]:
    """The parts of a pipeline whose blocks are known, and the decoder of single images beside one.

    Raises:
        Problem: If there are none.
    """
    need_diffusers()
    parts = [pipeline] if isinstance(pipeline, nn.Module) else list(getattr(pipeline, "components", {}).values())
    networks = [part for part in parts if isinstance(part, nn.Module)]
    known = [part for part in networks if any(type(each).__name__ in BLOCKS for each in part.modules())]
    if not known:
        names = ", ".join(type(part).__name__ for part in networks) or type(pipeline).__name__
        raise Problem(
            f"There is nothing to streamline in a {type(pipeline).__name__}.", why=f"of {names} no block is known.",
            fix="a pipeline with a UNet of Stable Video Diffusion or AnimateDiff, or with the transformer of Wan, LTX-Video, CogVideoX or HunyuanVideo.", code=Exit.INCOMPATIBLE,
        )  # fmt: skip
    return known + [part for part in networks if type(part).__name__ == IMAGES]


def _run(
    block: nn.Module, before: Callable[..., Any], program: Callable[..., Any], slices: Slices, *args: Any, **options: Any
) -> Any:
    """A block by its program, or its own way where that does not know what is asked."""
    free_u = all(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2"))
    adapted = isinstance(options.get("encoder_hidden_states"), tuple) or options.get("cross_attention_kwargs")
    if torch.is_grad_enabled() or free_u or adapted:
        return before(*args, **options)
    return program(block, slices, *args, **options)


def _run_in_place(before: Callable[[Tensor], Tensor], slices: Slices, x: Tensor) -> Tensor:
    return before(x) if torch.is_grad_enabled() else unet.in_place(before, x, slices)
