"""Trains a small AnimateDiff on clips of moving sprites or discs, since no package ships a video model: a stock pipeline of diffusers. About 40 processor minutes.

    python benchmarks/train_video.py sprites out/sprites
    python benchmarks/train_video.py discs out/discs

Clips have 8 frames of 32 by 32 pixels: clothes of Fashion-MNIST, or discs, in one of four colours, that fly and bounce. First a decoder of images learns latents of half the size, then the motion UNet to take noise out of those of a clip, by its prompt
(``a red coat``). The text encoder is a random one, which tells prompts apart as well as any. The seed is fixed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AnimateDiffPipeline, AutoencoderKL, DDIMScheduler, UNetMotionModel
from torch import Tensor, nn
from torch.nn.functional import interpolate, mse_loss
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from duramen.hardware.machine import fastest_device
from duramen.vision.images import open_images

FRAMES, SIZE, SPRITE = 8, 32, 14
COLOURS = {"red": (1.0, 0.25, 0.2), "green": (0.3, 0.9, 0.35), "blue": (0.3, 0.45, 1.0), "white": (1.0, 1.0, 1.0)}
CLOTHES = ("shirt", "trousers", "pullover", "dress", "coat", "sandal", "blouse", "sneaker", "bag", "boot")
START, END = "<|startoftext|>", "<|endoftext|>"


def main() -> None:
    """Trains one, and says how long it took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("clips", choices=("sprites", "discs"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=600, help="of the UNet")
    parser.add_argument("--decoder-steps", type=int, default=400)
    options = parser.parse_args()
    torch.manual_seed(0)
    begun, device = time.perf_counter(), fastest_device()
    draw = drawn(options.clips)
    decoder, (tokenizer, encoder) = images(), texts()
    unet, scheduler = denoiser(), DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1)
    for each in (decoder, encoder, unet):
        each.to(device)
    generator = torch.Generator().manual_seed(0)

    def picture(step: int) -> Tensor:
        clips, _ = draw(8, generator)
        pixels = clips.transpose(1, 2).flatten(0, 1).to(device)
        found = decoder.encode(pixels).latent_dist
        return mse_loss(decoder.decode(found.sample()).sample, pixels) + 1e-6 * found.kl().mean()

    def noise(step: int) -> Tensor:
        clips, prompts = draw(16, generator)
        with torch.no_grad():
            latents = decoder.encode(clips.transpose(1, 2).flatten(0, 1).to(device)).latent_dist.mode()
            latents = latents.view(16, FRAMES, *latents.shape[1:]).transpose(1, 2) * decoder.config.scaling_factor
            prompts = [prompt if torch.rand((), generator=generator) > 0.1 else "" for prompt in prompts]
            words = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
            looked = encoder(words.to(device))[0].repeat_interleave(FRAMES, 0)
        times = torch.randint(0, 1000, (16,), generator=generator).to(device)
        wanted = torch.randn(latents.shape, generator=generator).to(device)
        return mse_loss(unet(scheduler.add_noise(latents, wanted, times), times, looked).sample, wanted)

    learn(decoder, picture, options.decoder_steps, 3e-3)
    with torch.no_grad():
        latents = decoder.encode(draw(64, generator)[0].transpose(1, 2).flatten(0, 1).to(device)).latent_dist.mean
    decoder.register_to_config(scaling_factor=1 / float(latents.std()))
    learn(unet, noise, options.steps, 2e-3)
    pipeline = AnimateDiffPipeline(decoder, encoder, tokenizer, unet.eval(), None, scheduler)  # type: ignore[arg-type]
    pipeline.to("cpu").save_pretrained(options.out)
    print(f"{options.out}: {time.perf_counter() - begun:.0f} s", flush=True)


def learn(network: nn.Module, loss_of: Callable[[int], Tensor], steps: int, rate: float) -> None:
    """AdamW, its rate up for a twentieth and down along a cosine."""
    optimizer = torch.optim.AdamW(network.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    recent: list[float] = []
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append(float(loss.detach()))
        if (step + 1) % 50 == 0:
            print(type(network).__name__, step + 1, round(sum(recent[-50:]) / 50, 4), flush=True)


def drawn(kind: str) -> Callable[[int, torch.Generator], tuple[Tensor, list[str]]]:
    """What draws clips, [N, 3, T, H, W] from -1 to 1, and their prompts."""
    clothes = open_images("fashion-mnist", "train", size=28, channels=1) if kind == "sprites" else None

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        colours = torch.randint(0, len(COLOURS), (count,), generator=generator).tolist()
        names = [list(COLOURS)[each] for each in colours]
        tint = torch.tensor([COLOURS[name] for name in names])[:, :, None, None]
        if clothes is not None:
            chosen = torch.randint(0, len(clothes.labels), (count,), generator=generator)
            shapes = interpolate(clothes.pixels(chosen.tolist()).float() / 255, size=(SPRITE, SPRITE), mode="area")
            prompts = [
                f"a {name} {CLOTHES[int(clothes.labels[each])]}" for name, each in zip(names, chosen.tolist(), strict=True)
            ]
        else:
            radius = 3 + 3 * torch.rand(count, 1, 1, generator=generator)
            axis = torch.arange(SPRITE) - (SPRITE - 1) / 2
            apart = (axis[:, None].square() + axis.square()).sqrt()[None]
            shapes = (radius - apart + 0.5).clamp(0, 1)[:, None]
            prompts = [f"a {name} disc" for name in names]
        return flown(shapes * tint, generator), prompts

    return draw


def flown(sprites: Tensor, generator: torch.Generator) -> Tensor:
    """Clips in which sprites [N, 3, h, w] fly at a constant speed and bounce."""
    count, room = len(sprites), SIZE - SPRITE
    place = room * torch.rand(count, 2, generator=generator)
    speed = 2.5 * (2 * torch.rand(count, 2, generator=generator) - 1)
    clips = torch.full((count, 3, FRAMES, SIZE, SIZE), -1.0)
    for frame in range(FRAMES):
        found = (place + speed * frame) % (2 * room)
        corner = torch.where(found > room, 2 * room - found, found).round().long()
        for number, (top, left) in enumerate(corner.tolist()):
            clips[number, :, frame, top : top + SPRITE, left : left + SPRITE] = 2 * sprites[number] - 1
    return clips


def images() -> AutoencoderKL:
    """Four channels of half the size."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(16, 32), latent_channels=4,
        norm_num_groups=8, sample_size=SIZE,
    )  # fmt: skip


def texts() -> tuple[CLIPTokenizer, CLIPTextModel]:
    """A tokenizer of characters, and a small random encoder that stays as it is."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*letters, *(f"{each}</w>" for each in letters), START, END]
    tokenizer = CLIPTokenizer({piece: number for number, piece in enumerate(pieces)}, [], model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(pieces), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, bos_token_id=len(pieces) - 2,
        eos_token_id=len(pieces) - 1, pad_token_id=len(pieces) - 1,
    )  # fmt: skip
    return tokenizer, CLIPTextModel(config).eval().requires_grad_(False)


def denoiser() -> UNetMotionModel:
    """Of 1.6 million parameters."""
    return UNetMotionModel(
        sample_size=SIZE // 2, down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"), up_block_types=("CrossAttnUpBlockMotion", "UpBlockMotion"),
        block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32, num_attention_heads=4, motion_num_attention_heads=4,
    )  # fmt: skip


if __name__ == "__main__":
    main()
