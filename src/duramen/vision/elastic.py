"""A vision transformer out of which smaller ones can be taken: narrower, shallower, with fewer heads and neurons in any layer, and with any share of the rows of any matrix at eight bits and the others at four.

All of them use the first rows and columns of the same latent weights ("weight entanglement", AutoFormer, arXiv 2107.00651; with bits, "Quasar-ViT", arXiv 2407.18175). A learned factor for every channel scales what
a layer adds to the stream, as LayerScale does (arXiv 2103.17239), which is our reading of the paper's supernet layer scaling. A network that was taken out is of the same class, with a config that says all it is.

What has matrices is in whole numbers: inputs of every matrix, queries, keys, values and attention maps have one step each. Norms, softmax, GELU and the stream are in floats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm
from transformers import PreTrainedConfig, PreTrainedModel

from duramen.hardware.cost import Part
from duramen.hardware.fpga import Shape
from duramen.problem import Problem
from duramen.quantize.mixed_linear import InputStep, MixedLinear, widest_exact
from duramen.vision.patches import patches_across
from duramen.vision.stream import ImageOutput

SITES = ("qkv", "proj", "fc1", "fc2")
"""Matrices of a layer, in the order of the shares of their rows."""
EPS = 1e-6


@dataclass(frozen=True, order=True)
class Architecture:
    """What a network is made of.

    Attributes:
        width: Channels of the stream.
        heads: Of every layer.
        ratios: Neurons of every layer's MLP, in widths.
        eight: Share of the rows of ``SITES`` that have eight bits, in every layer.
    """

    width: int
    heads: tuple[int, ...]
    ratios: tuple[float, ...]
    eight: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, width: int, layers: Sequence[tuple[int, float, tuple[float, ...]]]) -> Architecture:
        """Of (heads, ratio, shares) of every layer."""
        return cls(width, *zip(*layers, strict=True))

    @classmethod
    def read(cls, said: dict[str, Any]) -> Architecture:
        """Of what ``as_dict`` gave."""
        return cls(said["width"], tuple(said["heads"]), tuple(said["ratios"]), tuple(map(tuple, said["eight"])))

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        return {
            "width": self.width,
            "heads": list(self.heads),
            "ratios": list(self.ratios),
            "eight": list(map(list, self.eight)),
        }

    def layer(self, number: int) -> tuple[int, float, tuple[float, ...]]:
        """Heads, ratio and shares of one."""
        return self.heads[number], self.ratios[number], self.eight[number]

    @property
    def depth(self) -> int:
        """Layers."""
        return len(self.heads)

    @property
    def hidden(self) -> tuple[int, ...]:
        """Neurons of every layer's MLP."""
        return tuple(round(ratio * self.width) for ratio in self.ratios)

    def parts(self, config: ElasticViTConfig) -> list[Part]:
        """The products of an image, as they run together: patches, attention and MLP of every layer, head; patches and head have eight bits."""
        tokens, size, width = config.tokens, config.head_size, self.width
        found: list[Part] = [(Shape(width, config.patch_features, tokens - 1, 1.0),)]
        for heads, hidden, eight in zip(self.heads, self.hidden, self.eight, strict=True):
            inner = heads * size
            sides = ((3 * inner, width), (width, inner), (hidden, width), (width, hidden))
            qkv, proj, fc1, fc2 = (Shape(*side, tokens, share) for side, share in zip(sides, eight, strict=True))
            maps = Shape(tokens, size, tokens, kind="attention", times=heads)
            mixed = Shape(size, tokens, tokens, kind="attention", times=heads)
            found += [(qkv, maps, mixed, proj), (fc1, fc2)]
        return [*found, (Shape(config.num_labels, width, 1, 1.0),)]

    def products(self, config: ElasticViTConfig) -> int:
        """Multiply-adds of an image."""
        return sum(shape.products for part in self.parts(config) for shape in part)


@strict
class ElasticViTConfig(PreTrainedConfig):  # type: ignore[misc]
    """Config of the largest network that can be taken.

    Attributes:
        hidden_size: Width.
        heads: Of every layer.
        hidden: Neurons of every layer's MLP.
        eight: Share of rows with eight bits, of ``SITES`` in every layer.
        head_size: P, channels of a head; the same at any width.
        image_size: Height and width of images, pixels.
        patch_size: Of a patch, pixels.
        num_channels: Of an image.
        activation_bits: Of inputs of matrices.
        rounding: Whether anything is rounded; a supernet begins without.
        layer_scale: What the factors of layers begin with.
        pooling: What the head reads: the mean of all patches, or the class token.
        space: What sub-networks may be, as ``duramen.vision.supernet.Space``; None for a network that is one.
    """

    model_type = "elastic_vit"

    hidden_size: int = 384
    heads: list[int] = field(default_factory=lambda: [6] * 12)
    hidden: list[int] = field(default_factory=lambda: [1536] * 12)
    eight: list[list[float]] = field(default_factory=lambda: [[1.0] * 4] * 12)
    head_size: int = 64
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    activation_bits: int = 6
    rounding: bool = False
    layer_scale: float = 0.1
    pooling: str = "mean"
    space: dict[str, Any] | None = None

    @property
    def tokens(self) -> int:
        """Of an image, the class token among them."""
        return patches_across(self.image_size, self.patch_size) ** 2 + 1

    @property
    def patch_features(self) -> int:
        """Pixels of a patch, over all channels."""
        return self.num_channels * self.patch_size**2

    @property
    def architecture(self) -> Architecture:
        """The largest network."""
        ratios = tuple(hidden / self.hidden_size for hidden in self.hidden)
        return Architecture(self.hidden_size, tuple(self.heads), ratios, tuple(map(tuple, self.eight)))


class ElasticLayer(nn.Module):
    """Attention and MLP, each behind a norm and before a scale."""

    def __init__(self, config: ElasticViTConfig, heads: int, hidden: int) -> None:
        super().__init__()
        width, bits, self.size = config.hidden_size, config.activation_bits, config.head_size
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = MixedLinear(width, 3 * heads * self.size, bits, parts=3)
        self.proj = MixedLinear(heads * self.size, width, bits)
        self.fc1, self.fc2 = MixedLinear(width, hidden, bits), MixedLinear(hidden, width, bits)
        self.query, self.key, self.value = (InputStep(bits) for _ in range(3))
        self.map = InputStep(bits, signed=False)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((width,), config.layer_scale)) for _ in range(2))

    def forward(self, x: Float[Tensor, "B T D"], heads: int, hidden: int, eight: Sequence[float], *, rounding: bool) -> Tensor:
        """[B, T, D] -> the same shape, by so many heads and neurons."""
        width = x.shape[-1]
        added = self.proj(self._attention(_norm(x, self.norm1), heads, eight[0], rounding), width, eight[1], rounding=rounding)
        x = x + self.scale1[:width] * added
        inner = gelu(self.fc1(_norm(x, self.norm2), hidden, eight[2], rounding=rounding))
        result: Tensor = x + self.scale2[:width] * self.fc2(inner, width, eight[3], rounding=rounding)
        return result

    def _attention(self, x: Tensor, heads: int, share: float, rounding: bool) -> Tensor:
        split = self.qkv(x, 3 * heads * self.size, share, rounding=rounding).unflatten(-1, (3, heads, self.size))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        logits = _product(query, key.transpose(-1, -2), self.query, self.key, rounding=rounding) * self.size**-0.5
        mixed = _product(logits.softmax(-1), value, self.map, self.value, rounding=rounding)
        return mixed.transpose(1, 2).flatten(2)


def _product(one: Tensor, other: Tensor, step: InputStep, other_step: InputStep, *, rounding: bool) -> Tensor:
    """Of matrices of activations, in whole numbers."""
    step.look(one)
    other_step.look(other)
    if not rounding:
        return one @ other
    (codes, unit), (other_codes, other_unit) = step(one), other_step(other)
    result: Tensor = (codes @ other_codes) * (unit * other_unit)
    return result


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    width = x.shape[-1]
    return layer_norm(x, (width,), norm.weight[:width], norm.bias[:width], EPS)


class ElasticViTForImageClassification(PreTrainedModel):  # type: ignore[misc]
    """The network; ``architecture`` says which part of it runs.

    Attributes:
        architecture: At first the largest.
    """

    config: ElasticViTConfig
    config_class = ElasticViTConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ElasticViTConfig) -> None:
        super().__init__(config)
        _check_widths(config)
        width = config.hidden_size
        self.embed = MixedLinear(config.patch_features, width, config.activation_bits)
        self.class_token = nn.Parameter(torch.zeros(width))
        self.places = nn.Parameter(torch.zeros(config.tokens, width))
        self.layers = nn.ModuleList(ElasticLayer(config, *each) for each in zip(config.heads, config.hidden, strict=True))
        self.norm = nn.LayerNorm(width)
        self.head = MixedLinear(width, config.num_labels, config.activation_bits)
        self.architecture = config.architecture
        self.post_init()

    def forward(self, pixel_values: Float[Tensor, "B c H W"], labels: Int[Tensor, "B"] | None = None, **_: Any) -> ImageOutput:
        """Runs the part that ``architecture`` names.

        Args:
            pixel_values: Images, normalised.
            labels: Classes, for the loss.
        """
        config, chosen = self.config, self.architecture
        size, width = config.patch_size, chosen.width
        patches = nn.functional.unfold(pixel_values, size, stride=size).transpose(1, 2)
        x = self.embed(patches, width, 1.0, rounding=config.rounding)
        x = torch.cat([self.class_token[:width].expand(len(x), 1, -1), x], 1) + self.places[:, :width]
        for layer, heads, hidden, eight in zip(self.layers, chosen.heads, chosen.hidden, chosen.eight, strict=False):
            x = layer(x, heads, hidden, eight, rounding=config.rounding)
        x = _norm(x, self.norm)
        read = x[:, 0] if config.pooling == "class" else x[:, 1:].mean(1)
        logits = self.head(read, config.num_labels, 1.0, rounding=config.rounding)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return ImageOutput(loss, logits, x)

    def linears(self) -> Iterator[tuple[str, MixedLinear, float, Tensor | None]]:
        """Name, matrix, share of rows with eight bits and layer scale of all matrices of the whole network."""
        yield "embed", self.embed, 1.0, None
        for number, (layer, eight) in enumerate(zip(self.layers, self.config.eight, strict=True)):
            assert isinstance(layer, ElasticLayer)
            for site, share in zip(SITES, eight, strict=True):
                scale = {"proj": layer.scale1, "fc2": layer.scale2}.get(site)
                yield f"layers.{number}.{site}", getattr(layer, site), share, scale
        yield "head", self.head, 1.0, None

    def _init_weights(self, module: nn.Module) -> None:
        """Outputs as large as inputs: narrow layers hardly learn from the customary deviation of 0.02."""
        if isinstance(module, MixedLinear):
            nn.init.trunc_normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        elif isinstance(module, ElasticViTForImageClassification):
            nn.init.trunc_normal_(module.places, std=0.02)


def _check_widths(config: ElasticViTConfig) -> None:
    """Stops where float32 would not add exactly.

    Raises:
        Problem: If a matrix has more inputs than that.
    """
    most, widest = widest_exact(config.activation_bits), max(config.patch_features, config.hidden_size, *config.hidden)
    if widest > most:
        raise Problem(
            f"A matrix of {widest:,} inputs of {config.activation_bits} bits is not exact in float32.",
            why=f"its sums of products with rows of eight bits are whole numbers up to 2^24 for at most {most:,} inputs.",
            fix="fewer `activation_bits`, or narrower layers.",
        )


@torch.no_grad()
def materialise(network: ElasticViTForImageClassification, architecture: Architecture) -> ElasticViTForImageClassification:
    """A network of its own, with what a sub-network uses; it gives the same bits."""
    config = ElasticViTConfig.from_dict(network.config.to_dict())
    config.hidden_size, config.heads, config.hidden = architecture.width, list(architecture.heads), list(architecture.hidden)
    config.eight, config.space = [list(each) for each in architecture.eight], None
    found: ElasticViTForImageClassification = ElasticViTForImageClassification(config).eval().to(network.class_token.device)
    theirs = dict(network.named_modules())
    for name, module in found.named_modules():
        if isinstance(module, MixedLinear):
            module.take_from(theirs[name])
            continue
        for own, value in module.named_parameters(recurse=False):
            whole = getattr(theirs[name], own)
            value.copy_(whole[..., : architecture.width] if value.ndim else whole)
    return found
