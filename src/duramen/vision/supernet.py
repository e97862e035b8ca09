"""A supernet of vision transformers: one training for all sub-networks, first in floats and then rounded, after which any of them can be taken out.

At first the largest sub-network learns alone; from then on every step trains it on labels and teacher, and the smallest and a few random ones on what the largest says (the sandwich rule and in-place
distillation of BigNAS, arXiv 2003.11142). Before anything is rounded the best steps are chosen, and the order of rows by what eight bits save (``duramen.quantize.rows``), which then stays. A pretrained transformer can be the beginning: its heads, neurons and
channels are sorted by what they put out, so that first ones are the important ones, and its function stays.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from duramen.hardware.machine import fastest_device
from duramen.problem import Problem
from duramen.quantize.mixed_linear import InputStep, MixedLinear
from duramen.registry import method
from duramen.vision.elastic import (
    SITES,
    Architecture,
    ElasticLayer,
    ElasticViTConfig,
    ElasticViTForImageClassification,
    materialise,
)
from duramen.vision.images import Images, in_parts
from duramen.vision.studio import Studio
from duramen.vision.train import Classification, TrainingSettings, logits_of, record_of, train_classifier

Some = Field(min_length=1)
CALIBRATED = 256
"""Images by which steps and rows are chosen."""


class Space(BaseModel):
    """What sub-networks may be; each list in any order.

    Attributes:
        widths: Channels of the stream.
        depths: Layers.
        heads: Of a layer, each of the same size whatever the width.
        ratios: Neurons of an MLP, in widths.
        shares: Of the rows of a matrix that have eight bits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    widths: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Some]
    depths: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Some]
    heads: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Some]
    ratios: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Some]
    shares: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Some] = (0.0, 0.25, 0.5, 0.75, 1.0)

    def same(self, width: int, depth: int, heads: int, ratio: float, share: float) -> Architecture:
        """With all layers alike."""
        return Architecture(width, (heads,) * depth, (ratio,) * depth, ((share,) * 4,) * depth)

    @property
    def largest(self) -> Architecture:
        """The largest of everything."""
        return self.same(max(self.widths), max(self.depths), max(self.heads), max(self.ratios), max(self.shares))

    @property
    def smallest(self) -> Architecture:
        """The smallest of everything."""
        return self.same(min(self.widths), min(self.depths), min(self.heads), min(self.ratios), min(self.shares))

    def kinds(self) -> list[Architecture]:
        """Networks among which all sizes of all parts are."""
        most = self.largest
        pairs = list(zip_longest(self.heads, self.ratios))
        return [
            self.same(width, 1, heads or most.heads[0], ratio or most.ratios[0], 0.0)
            for width in self.widths
            for heads, ratio in pairs
        ]

    def draw(self, generator: torch.Generator, *, deepest: bool = False) -> Architecture:
        """Anything, all choices alike and layer by layer; of all layers if ``deepest``."""

        def one(choices: Sequence[Any]) -> Any:
            return choices[int(torch.randint(len(choices), (1,), generator=generator))]

        width, depth = one(self.widths), one(self.depths)
        layers = [
            (one(self.heads), one(self.ratios), tuple(one(self.shares) for _ in SITES))
            for _ in range(max(self.depths) if deepest else depth)
        ]
        return Architecture.of(width, layers)


@contextmanager
def running(network: Any, architecture: Architecture) -> Iterator[None]:
    """A supernet as one of its sub-networks, for a while."""
    before, network.architecture = network.architecture, architecture
    try:
        yield
    finally:
        network.architecture = before


@dataclass
class Sandwich(Classification):
    """The task: the largest learns from labels and teacher, the smallest and random ones from what the largest says.

    Attributes:
        sampled: Random sub-networks of every step; which they are follows from its images.
    """

    sampled: int = 2

    @property
    def space(self) -> Space:
        """Of sub-networks."""
        return space_of(self.network)

    def loss(self, indices: Sequence[int]) -> Tensor:
        """Sum over some images and all sub-networks of the step."""
        pixels, labels = self.batch(indices)
        logits = logits_of(self.network, pixels)
        total, said = self.terms(logits, pixels, labels)["loss"], log_softmax(logits.detach(), -1)
        generator = torch.Generator().manual_seed(zlib.crc32(repr(list(indices)).encode()))
        for each in [self.space.smallest, *(self.space.draw(generator) for _ in range(self.sampled))]:
            with running(self.network, each):
                total = total + kl_div(log_softmax(logits_of(self.network, pixels), -1), said, log_target=True, reduction="sum")
        return total

    def held_out(self) -> dict[str, float]:
        """The mean loss of the largest and the smallest, and what each tells wrong."""
        largest = super().held_out()
        with running(self.network, self.space.smallest):
            smallest = super().held_out()
        return {
            "loss": (largest["loss"] + smallest["loss"]) / 2,
            "wrong": largest["wrong"],
            "wrong by the smallest": smallest["wrong"],
        }


def space_of(network: Any) -> Space:
    """The space of a supernet.

    Raises:
        Problem: If the model is none.
    """
    said = getattr(network.config, "space", None)
    if not isinstance(network, ElasticViTForImageClassification) or said is None:
        raise Problem(
            "The model is no supernet.",
            why="no sub-networks can be taken out of it.",
            fix="a step `supernet` first, or the folder of a run that had one.",
        )
    return Space.model_validate(said)


@torch.no_grad()
def collect_grams(network: ElasticViTForImageClassification, images: Images, count: int = CALIBRATED) -> dict[str, Tensor]:
    """XXᵀ of the inputs of every matrix of the whole network, over a few images."""
    matrices = {name: module for name, module in network.named_modules() if isinstance(module, MixedLinear)}
    for matrix in matrices.values():
        inputs = matrix.weight.shape[1]
        matrix.gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=matrix.weight.device)
    for pixels, _ in in_parts(images, count):
        logits_of(network, pixels)
    found = {}
    for name, matrix in matrices.items():
        assert matrix.gram is not None
        found[name], matrix.gram = matrix.gram, None
    return found


@torch.no_grad()
def settle_inputs(network: ElasticViTForImageClassification, images: Images, count: int = CALIBRATED) -> None:
    """Chooses the steps of all activations of the part that runs, by a few images."""
    steps = [module for module in network.modules() if isinstance(module, InputStep)]
    for step in steps:
        step.seen = []
    for pixels, _ in in_parts(images, count):
        logits_of(network, pixels)
    for step in steps:
        step.settle()


def begin_rounding(network: ElasticViTForImageClassification, images: Images) -> None:
    """Chooses all steps, and the order of rows, of a network in floats, which rounds from now on."""
    for name, gram in collect_grams(network, images).items():
        matrix = network.get_submodule(name)
        assert isinstance(matrix, MixedLinear)
        matrix.settle(gram)
    settle_inputs(network, images)
    network.config.rounding = True


NAMES = {
    "dinov2": ("dinov2.", "encoder.layer", "norm1", "norm2", True),
    "vit": ("vit.", "layers", "layernorm_before", "layernorm_after", False),
}
"""Of the body, its layers, the norms of a layer, and whether it has layer scales, by the type of a model."""


def supernet_of(network: Any, space: Space, images: Images, *, bits: int) -> ElasticViTForImageClassification:
    """The largest sub-network of a space, out of a pretrained transformer; the most important heads, neurons and channels are the first.

    Args:
        network: A ViT or DINOv2 with a head.
        space: Of sub-networks, not larger than the model.
        images: By which importance is measured.
        bits: Of activations.

    Raises:
        Problem: If the model is of another kind, or smaller than the space.
    """
    config, most = network.config, space.largest
    width, depth, heads, hidden = check_beginning(network, space)
    state = {name: value.detach().float() for name, value in network.state_dict().items()}
    whole = ElasticViTForImageClassification(
        ElasticViTConfig(
            hidden_size=width, heads=[heads] * depth, hidden=[hidden] * depth, eight=[[1.0] * 4] * depth, activation_bits=bits,
            **_taken_over(config),
        )
    ).eval()  # fmt: skip
    whole.config.image_mean, whole.config.image_std = (getattr(config, name, None) for name in ("image_mean", "image_std"))
    whole.load_state_dict(renamed(state, config), strict=False)
    whole.to(next(network.parameters()).device)
    sort_units(whole, collect_grams(whole, images))
    found = materialise(whole, most)
    found.config.space = space.model_dump(mode="json")
    return found


def _taken_over(config: Any) -> dict[str, Any]:
    """What a supernet has from the pretrained transformer that it begins with."""
    return {
        "head_size": config.hidden_size // config.num_attention_heads, "image_size": config.image_size, "patch_size": config.patch_size,
        "num_channels": config.num_channels, "id2label": config.id2label, "pooling": "class",
    }  # fmt: skip


def check_beginning(network: Any, space: Space) -> tuple[int, int, int, int]:
    """Width, layers, heads and neurons of a pretrained transformer.

    Raises:
        Problem: If a supernet of that space cannot begin with it.
    """
    config, most = network.config, space.largest
    if config.model_type not in NAMES:
        raise Problem(
            f"No supernet can begin with a model of type {config.model_type}.", why="its layers are not those of a plain vision transformer.",
            fix=f"a model of type {' or '.join(NAMES)}, or `new`.",
        )  # fmt: skip
    width, depth, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    body, layers, *_ = NAMES[config.model_type]
    hidden = len(network.get_parameter(f"{body}{layers}.0.mlp.fc1.weight"))
    for what, wanted, there in (
        ("channels", most.width, width), ("layers", most.depth, depth), ("heads", most.heads[0], heads), ("neurons", most.hidden[0], hidden),
    ):  # fmt: skip
        if wanted > there:
            raise Problem(
                f"The space has {wanted} {what}, and the model {there}.",
                why="a sub-network is a part of it.",
                fix="a smaller largest choice, or `new`.",
            )
    return width, depth, heads, hidden


def renamed(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The weights of a pretrained transformer by the names of ours; of a head that also reads the mean of patches, what reads the class token."""
    body, layers, norm1, norm2, scaled = NAMES[config.model_type]
    embeddings, width = f"{body}embeddings.", config.hidden_size
    found = {
        "embed.weight": state[f"{embeddings}patch_embeddings.projection.weight"].flatten(1),
        "embed.bias": state[f"{embeddings}patch_embeddings.projection.bias"],
        "class_token": state[f"{embeddings}cls_token"][0, 0], "places": state[f"{embeddings}position_embeddings"][0],
        "head.weight": state["classifier.weight"][:, :width], "head.bias": state["classifier.bias"],
    }  # fmt: skip
    for kind in ("weight", "bias"):
        found[f"norm.{kind}"] = state[f"{body}layernorm.{kind}"]
    for number in range(config.num_hidden_layers):
        theirs, ours = f"{body}{layers}.{number}.", f"layers.{number}."
        for kind in ("weight", "bias"):
            found[f"{ours}norm1.{kind}"], found[f"{ours}norm2.{kind}"] = (
                state[f"{theirs}{norm}.{kind}"] for norm in (norm1, norm2)
            )
            parts = [state.get(f"{theirs}attention.{name}_proj.{kind}") for name in "qkv"]
            if all(part is not None for part in parts):
                found[f"{ours}qkv.{kind}"] = torch.cat(parts)  # type: ignore[arg-type]
            found[f"{ours}proj.{kind}"] = state[f"{theirs}attention.o_proj.{kind}"]
            found[f"{ours}fc1.{kind}"], found[f"{ours}fc2.{kind}"] = (
                state[f"{theirs}mlp.{name}.{kind}"] for name in ("fc1", "fc2")
            )
        for place in (1, 2):
            ones = torch.ones(width)
            found[f"{ours}scale{place}"] = state[f"{theirs}layer_scale{place}.lambda1"] if scaled else ones
    return found


@torch.no_grad()
def sort_units(network: ElasticViTForImageClassification, grams: dict[str, Tensor]) -> None:
    """Puts the heads and neurons that put out most, and the channels of which most is read, first; the function stays.

    What a unit puts out is E[x²]·‖w‖², w what the next matrix reads it with; of a channel, the share of that in all matrices that read the stream.
    """

    def energy(name: str, matrix: MixedLinear) -> Tensor:
        return grams[name].diagonal().float() * matrix.weight.square().sum(0)

    read = [energy("head", network.head)]
    for number, layer in enumerate(network.layers):
        assert isinstance(layer, ElasticLayer)
        read += [energy(f"layers.{number}.{site}", getattr(layer, site)) for site in ("qkv", "fc1")]
        neurons = energy(f"layers.{number}.fc2", layer.fc2).argsort(descending=True, stable=True)
        _reorder(layer.fc1, rows=neurons)
        _reorder(layer.fc2, columns=neurons)
        by_head = energy(f"layers.{number}.proj", layer.proj).view(-1, layer.size).sum(1)
        heads = by_head.argsort(descending=True, stable=True)
        channels = (heads[:, None] * layer.size + torch.arange(layer.size, device=heads.device)).flatten()
        _reorder(layer.proj, columns=channels)
        _reorder(layer.qkv, rows=torch.cat([channels + part * len(channels) for part in range(3)]))
    order = torch.stack([each / each.sum() for each in read]).sum(0).argsort(descending=True, stable=True)
    norms = [network.norm]
    for layer in network.layers:
        assert isinstance(layer, ElasticLayer)
        norms += [layer.norm1, layer.norm2]
        for reads in (layer.qkv, layer.fc1):
            _reorder(reads, columns=order)
        for writes in (layer.proj, layer.fc2):
            _reorder(writes, rows=order)
        for scale in (layer.scale1, layer.scale2):
            scale.copy_(scale[order])
    _reorder(network.embed, rows=order)
    _reorder(network.head, columns=order)
    for own in (network.class_token, *(each for norm in norms for each in norm.parameters())):
        own.copy_(own[order])
    network.places.copy_(network.places[:, order])


def _reorder(matrix: MixedLinear, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    if rows is not None:
        matrix.weight.copy_(matrix.weight[rows])
        matrix.bias.copy_(matrix.bias[rows])
    if columns is not None:
        matrix.weight.copy_(matrix.weight[:, columns])


class Settings(TrainingSettings):
    """Settings of the supernet; those of its space count only where it is made."""

    widths: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Some] = (64, 96, 128)
    """Channels of the stream."""
    depths: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Some] = (4, 5, 6)
    """Layers."""
    heads: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Some] = (2, 3, 4)
    """Of each layer, all of one size at any width."""
    ratios: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Some] = (2.0, 3.0, 4.0)
    """Neurons of each layer's MLP, in widths."""
    shares: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Some] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Of the rows of each matrix that have eight bits; the others have four."""
    head_size: Annotated[int, Field(ge=1)] = 32
    """Of a new supernet: channels of a head; one that begins with a model has the model's."""
    patch: Annotated[int, Field(ge=1)] = 4
    """Of a new supernet: pixels of a patch."""
    layer_scale: Annotated[float, Field(gt=0)] = 0.1
    """Of a new supernet: what the factors of layers begin with; 1e-5 for more than 18 layers (CaiT)."""
    activation_bits: Annotated[int, Field(ge=2, le=8)] = 6
    """Of the inputs of every matrix, with one step each; six is the most of which four products fit a multiplier."""
    sampled: Annotated[int, Field(ge=0)] = 2
    """Random sub-networks of every step, beside the largest and the smallest."""
    alone_steps: Annotated[int, Field(ge=0)] = 300
    """Of the largest sub-network alone, in floats; 0 for a model that is trained already. Without them the others have nothing to imitate at first."""
    steps: Annotated[int, Field(ge=0)] = 250
    """Of all sub-networks, in floats."""
    rounding_steps: Annotated[int, Field(ge=1)] = 120
    """Of all sub-networks, rounded."""
    at_once: Annotated[int, Field(ge=1)] = 128
    """Images that run together, with the same sub-networks."""
    alone_rate: Annotated[float, Field(gt=0)] = 2e-3
    """The learning rate of AdamW at its height, of the largest alone."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """The same, of all in floats."""
    rounding_rate: Annotated[float, Field(gt=0)] = 5e-4
    """The same, rounded."""
    distill_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the divergence from the model that it begins with, if there is one, in the loss of the largest; the others learn what the largest says, and nothing else."""

    @property
    def space(self) -> Space:
        """Of sub-networks."""
        return Space(widths=self.widths, depths=self.depths, heads=self.heads, ratios=self.ratios, shares=self.shares)


def rehearse(studio: Studio, settings: Settings) -> None:
    """Makes a supernet that has learned nothing, and stops where none can begin."""
    network: Any = studio.network
    if network is None:
        network = ElasticViTForImageClassification(new_config(settings, studio.train))
    elif isinstance(network, ElasticViTForImageClassification):
        space_of(network)
    else:
        check_beginning(network, settings.space)
        network = ElasticViTForImageClassification(config_of(settings, **_taken_over(network.config)))
    network.config.rounding = True
    studio.network = network


@method(
    "supernet",
    title="Supernet of vision transformers",
    paper="arXiv 2407.18175",
    kind="images",
    settings=Settings,
    rehearse=rehearse,
)
def apply(studio: Studio, settings: Settings) -> dict[str, Any]:
    """Makes a supernet, of nothing or of the model so far, and trains it in floats and rounded."""
    teacher, network = studio.network, studio.network
    if network is None:
        torch.manual_seed(settings.seed)
        config = new_config(settings, studio.train)
        network = ElasticViTForImageClassification(config).eval().to(fastest_device())
    elif isinstance(network, ElasticViTForImageClassification):
        space_of(network)
        teacher = None
    else:
        network = supernet_of(network, settings.space, studio.train, bits=settings.activation_bits)
    learnt = (teacher, settings.distill_weight, settings.temperature, settings.mirror)
    alone = Classification(network, studio.train, studio.aside, *learnt)
    together = Sandwich(network, studio.train, studio.aside, *learnt, settings.sampled)
    phases = {
        "the largest": (alone, settings.alone_steps, settings.alone_rate),
        "all in floats": (together, settings.steps, settings.learning_rate),
        "all rounded": (together, settings.rounding_steps, settings.rounding_rate),
    }
    begun, trainings = network.config.rounding, []
    for name, (task, steps, rate) in phases.items():
        rounded = name == "all rounded"
        if not steps or (begun and not rounded):
            continue
        if rounded and not begun:
            begin_rounding(network, studio.train)
        folder = studio.folder / name.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        schedule = dataclasses.replace(settings.schedule, steps=steps)
        history = train_classifier(task, schedule, rate, folder=folder, tell=studio.told)
        trainings.append(record_of(history, network, rate, distilled=teacher is not None, name=name))
    studio.network, space = network, space_of(network)
    return {
        "space": space.model_dump(mode="json"),
        "multiply_adds": {name: getattr(space, name).products(network.config) for name in ("largest", "smallest")},
        "trainings": trainings,
    }


def new_config(settings: Settings, images: Images) -> ElasticViTConfig:
    """Of a supernet of nothing, for such images."""
    _, channels, size, _ = images.pixels([0]).shape
    return config_of(
        settings, head_size=settings.head_size, image_size=size, patch_size=settings.patch, num_channels=channels,
        id2label=dict(enumerate(images.classes)), layer_scale=settings.layer_scale,
    )  # fmt: skip


def config_of(settings: Settings, **given: Any) -> ElasticViTConfig:
    """Of the largest network of the settings' space; the rest is given."""
    most = settings.space.largest
    return ElasticViTConfig(
        hidden_size=most.width, heads=list(most.heads), hidden=list(most.hidden), eight=[list(each) for each in most.eight],
        activation_bits=settings.activation_bits, space=settings.space.model_dump(mode="json"), **given,
    )  # fmt: skip
