"""Claim: sliced, a denoiser of video diffusion holds at most 0.35 of the activations that it holds as it is, and less than under either option of diffusers.

    python benchmarks/video_memory.py

Counts the activations of one denoising step at true shapes, both branches of guidance at once, in half precision, and of decoding a video; with tensors that have no data, so that neither weights nor a GPU are needed. Clips are 576 by 1024 pixels.
Of Wan one branch, as its pipeline runs it, at 480 by 832 pixels. Writes benchmarks/results/video_memory.csv. About ten minutes of one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

import rows
from duramen.video.plan import Clip, predict
from duramen.video.slices import Slices

MIB = 2**20
SLICED = {f"streamlined, {size} MiB": Slices(size * MIB) for size in (96, 64, 32, 16)} | {
    "streamlined, 16 MiB, nothing given back": Slices(16 * MIB, donate=False)
}
"""The largest feature of either network has 158 to 180 MiB."""
IMAGES = "images one by one"
"""Which ``streamline`` asks of a pipeline's decoder of single images."""


def main() -> None:
    """Counts all of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    options = parser.parse_args()
    table = rows.read("video_memory")
    for name in options.networks:
        network, clip, stock, sliced = NETWORKS[name]()
        subjects: dict[str, tuple[Clip, Slices | None, Callable[[Any], None]]] = {"as it is": (clip, None, lambda _: None)}
        subjects |= {label: (other, None, change) for label, (other, change) in stock.items()}
        subjects |= {label: (clip, slices, lambda _: None) for label, slices in sliced.items()}
        for subject, (mine, slices, change) in subjects.items():
            if any((row["case"], row["subject"]) == (name, subject) for row in table):
                continue
            peak = predict(network, mine, slices, change).peak / 2**30
            print(name, subject, round(peak, 3), flush=True)
            peer = rows.peer_of(table, name, "peak of activations", "as it is")
            table.append(rows.row(name, "peak of activations", "GiB", subject, peak, **rows.beside(peer)))
            rows.write("video_memory", table)
    rows.write("video_memory", [row for row in table if row["metric"] != WHOLE] + whole_pipelines(table))


def whole_pipelines(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What all weights and the larger of denoiser and decoder take, of every pipeline whose figures stand in the table."""
    made = []
    for name, (denoiser, decoder, ways, weights) in PIPELINES.items():
        base = 0.0
        for subject, (first, second) in ways.items():
            peaks = [
                float(row["value"]) for row in table if (row["case"], row["subject"]) in ((denoiser, first), (decoder, second))
            ]
            if len(peaks) == 2:
                value = weights() / 2**30 + max(peaks)
                base = base or value
                made.append(rows.row(name, WHOLE, "GiB", subject, value, peer="as it is", peer_value=base))
    return made


def _bytes(*networks: Any) -> int:
    return sum(parameter.nbytes for network in networks for parameter in network.parameters())


def svd_weights() -> int:
    """UNet, decoder and image encoder, in half precision."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=1024,
    )
    return _bytes(svd()[0], decoder()[0], _made(lambda: CLIPVisionModelWithProjection(config)))


def animatediff_weights() -> int:
    """UNet, decoder and text encoder, in half precision."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    return _bytes(animatediff()[0], image_decoder()[0], _made(lambda: CLIPTextModel(config)))


def _made(build: Callable[[], Any]) -> Any:
    """A network in half precision that holds no data."""
    with torch.device("meta"):
        return build().half()


def svd() -> tuple[Any, Clip, dict[str, Any], dict[str, Slices]]:
    """Stable Video Diffusion, 14 frames."""
    from diffusers import UNetSpatioTemporalConditionModel

    clip = Clip(576, 1024, 14)
    stock = {
        "guidance branch by branch": (Clip(576, 1024, 14, guided=False), lambda _: None),
        "forward chunking": (clip, lambda network: network.enable_forward_chunking(1, 0)),
    }
    return _made(UNetSpatioTemporalConditionModel), clip, stock, SLICED


def animatediff() -> tuple[Any, Clip, dict[str, Any], dict[str, Slices]]:
    """AnimateDiff, 16 frames; its chunks of feed-forward layers are single places, too many to count here (``video_speed.py`` does)."""
    from diffusers import UNetMotionModel

    clip = Clip(576, 1024, 16)
    stock = {"guidance branch by branch": (Clip(576, 1024, 16, guided=False), lambda _: None)}
    return _made(lambda: UNetMotionModel(cross_attention_dim=768)), clip, stock, SLICED


def image_decoder() -> tuple[Any, Clip, dict[str, Any], dict[str, Slices]]:
    """The decoder of single images that AnimateDiff takes, all 16 frames at once, as its pipeline asks."""
    from diffusers import AutoencoderKL

    blocks = {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    clip = Clip(576, 1024, 16)
    return _made(lambda: AutoencoderKL(**blocks)), clip, {IMAGES: (clip, lambda network: network.enable_slicing())}, {}


def decoder() -> tuple[Any, Clip, dict[str, Any], dict[str, Slices]]:
    """The temporal decoder of Stable Video Diffusion, all 14 frames at once; its own smaller chunks give other videos."""
    from diffusers import AutoencoderKLTemporalDecoder

    blocks = {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
    }
    return _made(lambda: AutoencoderKLTemporalDecoder(**blocks)), Clip(576, 1024, 14), {}, SLICED


def wan() -> tuple[Any, Clip, dict[str, Any], dict[str, Slices]]:
    """Wan of 1.3 billion parameters, 81 frames."""
    from diffusers import WanTransformer3DModel

    return (
        _made(lambda: WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30)),
        Clip(480, 832, 81, guided=False),
        {},
        {label: SLICED[label] for label in ("streamlined, 64 MiB", "streamlined, 32 MiB", "streamlined, 16 MiB")},
    )


def ltx() -> tuple[Any, Clip, dict[str, Any], dict[str, Slices]]:
    """LTX-Video of 2 billion parameters, 161 frames."""
    from diffusers import LTXVideoTransformer3DModel

    return (
        _made(LTXVideoTransformer3DModel),
        Clip(512, 704, 161, factor=32),
        {},
        {label: SLICED[label] for label in ("streamlined, 64 MiB", "streamlined, 32 MiB", "streamlined, 16 MiB")},
    )


def cogvideox() -> tuple[Any, Clip, dict[str, Any], dict[str, Slices]]:
    """CogVideoX of 5 billion parameters, 49 frames."""
    from diffusers import CogVideoXTransformer3DModel

    return (
        _made(
            lambda: CogVideoXTransformer3DModel(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True)
        ),
        Clip(480, 720, 49),
        {"guidance branch by branch": (Clip(480, 720, 49, guided=False), lambda _: None)},
        {label: SLICED[label] for label in ("streamlined, 64 MiB", "streamlined, 32 MiB", "streamlined, 16 MiB")},
    )


def hunyuan() -> tuple[Any, Clip, dict[str, Any], dict[str, Slices]]:
    """HunyuanVideo of 13 billion parameters, 129 frames."""
    from diffusers import HunyuanVideoTransformer3DModel

    return (
        _made(lambda: HunyuanVideoTransformer3DModel(guidance_embeds=True)),
        Clip(720, 1280, 129, guided=False),
        {},
        {label: SLICED[label] for label in ("streamlined, 64 MiB", "streamlined, 32 MiB", "streamlined, 16 MiB")},
    )


NETWORKS = {
    "Wan-1.3B 81 frames": wan,
    "LTX-2B 161 frames": ltx,
    "CogVideoX-5B 49 frames": cogvideox,
    "HunyuanVideo-13B 129 frames": hunyuan,
    "SVD 14 frames": svd,
    "AnimateDiff 16 frames": animatediff,
    "SVD decoder 14 frames": decoder,
    "AnimateDiff decoder 16 frames": image_decoder,
}

WHOLE = "peak of the whole pipeline"
PIPELINES: dict[str, tuple[str, str, dict[str, tuple[str, str]], Callable[[], int]]] = {
    "SVD": (
        "SVD 14 frames", "SVD decoder 14 frames",
        {"as it is": ("as it is", "as it is")} | {label: (label, label) for label in ("streamlined, 96 MiB", "streamlined, 64 MiB")}, svd_weights,
    ),
    "AnimateDiff": (
        "AnimateDiff 16 frames", "AnimateDiff decoder 16 frames",
        {"as it is": ("as it is", "as it is")} | {label: (label, IMAGES) for label in ("streamlined, 96 MiB", "streamlined, 64 MiB")}, animatediff_weights,
    ),
}  # fmt: skip


if __name__ == "__main__":
    main()
