"""Images with their classes: embedded sets, folders with one subfolder per class, and shapes that are drawn when they are asked for."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from duramen.assets import DEBIAN
from duramen.problem import Problem
from duramen.recipe import DRAWN, FASHION

AT_ONCE = 64
"""Images that run together where nothing is learned."""
Split = Literal["train", "test"]
Corrupt = Literal["refuse", "skip"]
GARMENTS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
SHAPES = ("disc", "ring", "square", "frame", "plus", "cross", "triangle", "rows", "columns", "checks")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")


class Images(Protocol):
    """A set of images."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names."""

    @property
    def labels(self) -> Int[Tensor, "N"]:
        """Number of the class of each."""

    def pixels(self, indices: Sequence[int]) -> UInt8[Tensor, "B c H W"]:
        """Some of them."""

    def part(self, indices: Int[Tensor, "n"]) -> Images:
        """A part of the set."""


@dataclass(frozen=True)
class Arrays:
    """Images in memory, [N, c, H, W]."""

    values: UInt8[Tensor, "N c H W"]
    labels: Int[Tensor, "N"]
    classes: tuple[str, ...]

    def pixels(self, indices: Sequence[int]) -> UInt8[Tensor, "B c H W"]:
        """Some of them."""
        return self.values[list(indices)]

    def part(self, indices: Int[Tensor, "n"]) -> Arrays:
        """A part of the set."""
        return Arrays(self.values[indices], self.labels[indices], self.classes)


@dataclass(frozen=True)
class Folder:
    """Image files, decoded when they are asked for: the short side to ``size`` pixels, and the middle of the long one.

    Attributes:
        files: In order.
        labels: Number of the class of each.
        classes: Their names.
        size: Pixels.
        channels: 3 for colour, 1 for grey; what a file has otherwise is converted.
        skipped: Files that cannot be read, and why.
    """

    files: tuple[Path, ...]
    labels: Int[Tensor, "N"]
    classes: tuple[str, ...]
    size: int
    channels: int
    skipped: tuple[tuple[Path, str], ...] = ()

    def pixels(self, indices: Sequence[int]) -> UInt8[Tensor, "B c H W"]:
        """Some of them."""
        return torch.stack([decode(self.files[index], self.size, self.channels) for index in indices])

    def part(self, indices: Int[Tensor, "n"]) -> Folder:
        """A part of the set."""
        return replace(self, files=tuple(self.files[index] for index in indices.tolist()), labels=self.labels[indices])


def open_images(
    source: str, split: Split, *, size: int, channels: int = 3, corrupt: Corrupt = "refuse", count: int | None = None
) -> Images:
    """Opens a set of images.

    Args:
        source: ``fashion-mnist``, ``shapes``, or a folder with ``train`` and ``test``, or one of them, in each of which every class has a subfolder.
        split: Which part.
        size: Height and width, pixels.
        channels: 3 or 1.
        corrupt: What becomes of files that cannot be read, for which all are looked at beforehand: the first is named, or all of them are left out, and stand in ``skipped``.
        count: The first so many only, of an embedded set or of shapes.

    Raises:
        Problem: If there is no such set, a file is damaged, or all images are of one class.
    """
    if source == FASHION:
        return _fashion(split, size, channels, count)
    if source == DRAWN:
        return shapes(count or (4000 if split == "train" else 1000), size, channels=channels, seed=int(split == "test"))
    return _folder(Path(source), split, size, channels, corrupt)


def in_parts(
    images: Images, count: int | None = None, at_once: int = AT_ONCE
) -> Iterator[tuple[UInt8[Tensor, "B c H W"], Int[Tensor, "B"]]]:
    """Pixels and labels of the first ``count`` images, or of all, so many at a time."""
    count = min(count or len(images.labels), len(images.labels))
    for start in range(0, count, at_once):
        chosen = range(start, min(start + at_once, count))
        yield images.pixels(chosen), images.labels[chosen.start : chosen.stop]


def seen_by(network: Any, pixels: UInt8[Tensor, "B c H W"]) -> Float[Tensor, "B c H W"]:
    """Images as a classifier wants them: at its size, in its colours, by the mean and deviation of its config, from 0 to 1, or from -1 to 1 where it has none; on its device."""
    config = network.config
    mean, deviation = (
        torch.tensor(getattr(config, name, None) or [0.5]).view(1, -1, 1, 1) for name in ("image_mean", "image_std")
    )
    scaled = resized(pixels, config.image_size, config.num_channels).float() / 255
    return ((scaled - mean) / deviation).to(next(network.parameters()).device)


def hash_images(images: Images) -> str:
    """sha256 of the labels, and of all pixels or of the names and sizes of files."""
    digest = hashlib.sha256(images.labels.numpy().tobytes())
    if isinstance(images, Arrays):
        digest.update(images.values.numpy().tobytes())
    elif isinstance(images, Folder):
        digest.update(str([(file.parent.name, file.name, file.stat().st_size) for file in images.files]).encode())
    return digest.hexdigest()


def resized(pixels: UInt8[Tensor, "B c H W"], size: int, channels: int) -> UInt8[Tensor, "B c H W"]:
    """Square images at another size, in another number of channels: grey is the mean of colours, and all colours of grey are alike."""
    if pixels.shape[1] > channels:
        pixels = pixels.float().mean(1, keepdim=True).round().byte()
    if pixels.shape[-1] != size:
        pixels = interpolate(pixels.float(), size=(size, size), mode="bilinear", antialias=True).round().clamp(0, 255).byte()
    return pixels.expand(-1, channels, -1, -1).contiguous()


def _fashion(split: Split, size: int, channels: int, count: int | None) -> Arrays:
    folder, name = DEBIAN["fashion-mnist"].path(), "train" if split == "train" else "t10k"
    images = _idx(folder / f"{name}-images-idx3-ubyte.gz", 16, count and count * 784).reshape(-1, 1, 28, 28)
    labels = _idx(folder / f"{name}-labels-idx1-ubyte.gz", 8, count)
    return Arrays(resized(images, size, channels), labels.long(), GARMENTS)


def _idx(file: Path, header: int, count: int | None) -> UInt8[Tensor, "N"]:
    """Bytes of an IDX file behind its header."""
    with gzip.open(file) as stream:
        content = stream.read() if count is None else stream.read(header + count)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy())


def shapes(count: int, size: int, *, channels: int = 3, seed: int = 0) -> Arrays:
    """Images of shapes; see ``shapes_with_masks``."""
    return shapes_with_masks(count, size, channels=channels, seed=seed)[0]


def shapes_with_masks(count: int, size: int, *, channels: int = 3, seed: int = 0) -> tuple[Arrays, Bool[Tensor, "N H W"]]:
    """One of ten shapes, about a quarter as wide as the image, anywhere on noise, in any colour: most patches say nothing, and where the others are matters.

    Args:
        count: How many.
        size: Height and width.
        channels: 3, or 1 for grey.
        seed: Of everything that is drawn.

    Returns:
        The images, and which of their pixels are of the shape.
    """
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, len(SHAPES), (count,), generator=draw)
    radius = size * (0.11 + 0.05 * torch.rand(count, 1, 1, generator=draw))
    middle = radius + (size - 1 - 2 * radius) * torch.rand(count, 2, 1, 1, generator=draw).transpose(0, 1)
    rows, columns = torch.arange(float(size))[None, :, None], torch.arange(float(size))[None, None]
    down, right = (rows - middle[0]) / radius, (columns - middle[1]) / radius
    inside, drawn = (down.abs() <= 1) & (right.abs() <= 1), _drawn(down, right)
    mask = (drawn[labels, torch.arange(count)] & inside)[:, None]
    coarse = torch.randn(count, channels, size // 4 + 1, size // 4 + 1, generator=draw)
    ground = (
        96
        + 24 * interpolate(coarse, size=(size, size), mode="bilinear")
        + 12 * torch.randn(count, channels, size, size, generator=draw)
    )
    colour = 255 * torch.randint(0, 2, (count, channels, 1, 1), generator=draw).float()
    colour = torch.where(colour.amax(1, keepdim=True) == 0, 255.0, colour)
    return Arrays(torch.where(mask, colour, ground).clamp(0, 255).byte(), labels, SHAPES), mask[:, 0]


def _drawn(down: Tensor, right: Tensor) -> Tensor:
    """Every shape about every middle, bool [shapes, N, H, W]; coordinates are of its radius."""
    down, right = down + torch.zeros_like(right), right + torch.zeros_like(down)
    far, near = torch.maximum(down.abs(), right.abs()), down.square() + right.square()
    stripes = [((each + 1) * 2.5).floor() % 2 == 0 for each in (down, right)]
    return torch.stack([
        near <= 1, (near <= 1) & (near >= 0.4), far <= 0.85, (far <= 0.95) & (far >= 0.55), torch.minimum(down.abs(), right.abs()) <= 0.28,
        torch.minimum((down - right).abs(), (down + right).abs()) <= 0.4, (down >= 2 * right.abs() - 0.9) & (down <= 0.9),
        stripes[0], stripes[1], stripes[0] ^ stripes[1],
    ])  # fmt: skip


def decode(file: Path, size: int, channels: int = 3) -> UInt8[Tensor, "c size size"]:
    """Reads an image file, turned as its camera says, its short side scaled to ``size`` and its middle cut out; colours of any kind become those of ``channels``.

    Raises:
        Problem: If it cannot be read.
    """
    image_module, upright = _pillow()
    try:
        with image_module.open(file) as image:
            upright(image, in_place=True)
            if image.mode in ("I", "F"):
                raise ValueError("its pixels are numbers of 32 bits, of which nobody says which is white")
            if image.mode.startswith("I;16"):
                image = image_module.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
            whole = image.convert("RGB" if channels == 3 else "L")
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        raise Problem(
            f"{file} cannot be read as an image.", why=str(error) or type(error).__name__, fix="remove it, or `corrupt: skip`."
        ) from error
    scale = size / min(whole.size)
    whole = whole.resize([max(size, round(side * scale)) for side in whole.size], image_module.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in whole.size)
    values = np.asarray(whole.crop((left, top, left + size, top + size))).reshape(size, size, channels)
    return torch.from_numpy(values.copy()).permute(2, 0, 1)


def _pillow() -> tuple[Any, Any]:
    """Pillow's images, and what turns one as its camera says."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise Problem(
            "Image files need Pillow, which is not installed.", why="it is an extra.", fix="`python -m pip install pillow`"
        ) from error
    return Image, ImageOps.exif_transpose


def _folder(place: Path, split: Split, size: int, channels: int, corrupt: Corrupt) -> Folder:
    root = place / split if (place / split).is_dir() else place
    others = [name for name in ("train", "test", "val", "validation") if (place / name).is_dir()]
    if root == place and others:
        raise Problem(
            f"{place} has no folder `{split}`.",
            why=f"it has {' and '.join(f'`{name}`' for name in others)}, which would be taken for classes.",
            fix=f"call the folder of those images `{split}`.",
        )
    folders = (each.name for each in root.iterdir() if each.is_dir() and not each.name.startswith(".")) if root.is_dir() else ()
    classes = tuple(sorted(folders))
    if len(classes) < 2:
        raise Problem(
            f"{root} has {'one class' if classes else 'no classes'} of images.",
            why="every class is a subfolder with its files." if not classes else "nothing can be told apart.",
            fix="`fashion-mnist`, `shapes`, or a folder with two subfolders at least.",
        )
    found = [
        (file, number)
        for number, name in enumerate(classes)
        for file in sorted((root / name).rglob("*"))
        if file.suffix.lower() in SUFFIXES
    ]
    bad: list[tuple[Path, str]] = []
    for file, _ in found:
        try:
            decode(file, 8, channels)
        except Problem as problem:
            if corrupt == "refuse":
                raise
            bad.append((file, str(problem.why)))
    damaged = {file for file, _ in bad}
    kept = [(file, number) for file, number in found if file not in damaged]
    kept = [kept[place] for place in np.random.default_rng(0).permutation(len(kept))]  # the first so many are of all classes
    without = sorted({*range(len(classes))} - {number for _, number in kept})
    if without:
        raise Problem(
            f"{root} has no readable image of {', '.join(f'`{classes[number]}`' for number in without)}.",
            why=f"{len(bad)} of {len(found)} files cannot be read." if bad else "every subfolder is a class.",
            fix=f"files that end in {', '.join(SUFFIXES)}, or no such folder.",
        )
    labels = torch.tensor([number for _, number in kept])
    return Folder(tuple(file for file, _ in kept), labels, classes, size, channels, tuple(bad))
