"""Quantization-aware training: weights, and the steps of their grids, are learned while the model rounds as it will.

"EdgeQAT" (Shen et al., arXiv 2402.10787): learned steps, distillation, and losses on attention maps and on the spread of queries and keys (``losses``), with what its
paper and code have wrong put right. It starts from what an earlier step has rounded, if there is one, and otherwise from steps of the least squared error, not from LSQ's rule,
which begins far from them. Inputs, keys and values are rounded by token, with gradients that pass through.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from duramen.attention import Seen, attention_paths, watch
from duramen.calibrate.statistics import Statistics
from duramen.calibrate.walker import Records, Walk, walk_blocks
from duramen.families.model import BlockModel, Layer, Model
from duramen.families.select import trainable
from duramen.grids import Format, parse_format
from duramen.problem import Exit, Problem
from duramen.prune.masks import Masks
from duramen.prune.reconstruct import output_error
from duramen.quantize.learned import LearnedLinear
from duramen.quantize.losses import EntropyLoss, MapLoss, attention_map, code_entropy, entropy_loss, map_loss
from duramen.quantize.model import TYPES, formats_of
from duramen.quantize.steps import choose_steps
from duramen.registry import method
from duramen.rounding import start_rounding
from duramen.rundir import read_codes, read_formats
from duramen.train.data import Rows
from duramen.train.models import open_course, replaced, summary, teach
from duramen.train.objective import NextTokens
from duramen.train.settings import TrainSettings


class Settings(TrainSettings):
    """Settings of quantization-aware training."""

    format: str = ""
    """What is rounded, as in `gptq`; empty for what an earlier step has rounded, whose codes and steps are then the start."""
    step_type: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type that steps are stored in, and rounded to in every pass."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Of AdamW at its height, for weights."""
    step_rate: Annotated[float, Field(ge=0)] = 1e-3
    """The same for the logarithms of steps; 0 leaves the steps as they are."""
    distill_weight: Annotated[float, Field(ge=0, le=1)] = 0.99
    """Share of the divergence from the dense model in `distill`."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """By which both models' logits are divided in the divergence, which then counts its square."""
    map_loss: MapLoss = "row_kl"
    """How attention maps are kept near the dense model's: row by row (`row_kl`, `row_cos`), as wholes (`log_cos`), by what they read (`out_mse`), by logits, or not (`off`)."""
    map_weight: Annotated[float, Field(ge=0)] = 1.0
    """By which that loss is multiplied."""
    entropy_loss: EntropyLoss = "off"
    """How queries and keys keep their spread: as the dense model's (`match`, `gauss_kl`), or the wider the better (`paper`, `code`)."""
    entropy_weight: Annotated[float, Field(ge=0)] = 0.5
    """By which that loss is multiplied."""

    @field_validator("format")
    @classmethod
    def _is_a_format(cls, value: str) -> str:
        return parse_format(value).text if value else ""

    @property
    def leaves(self) -> tuple[str, ...]:
        """See ``duramen.order``."""
        return ("codes",)

    @property
    def undoes(self) -> tuple[str, ...]:
        """See ``duramen.order``."""
        return ("reduction",)


SHOWN = 32
"""Tokens of the attention maps that the report shows."""


@dataclass
class Imitation(NextTokens):
    """Next tokens, learned with a look at the teacher's attention.

    Attributes:
        maps: The loss of attention maps, and by what it is multiplied.
        entropy: The loss of the spread of queries and keys, and by what it is multiplied.
    """

    maps: tuple[MapLoss, float] = ("off", 0.0)
    entropy: tuple[EntropyLoss, float] = ("off", 0.0)
    seen: dict[str, list[Seen]] = field(default_factory=dict, repr=False)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Sees what attention is called with, for a while, if a loss needs it."""
        networks = {"student": self.course.network, "teacher": self.course.teacher}
        wanted = any(kind != "off" for kind, _ in (self.maps, self.entropy))
        modules = [
            (who, network.get_submodule(path))
            for who, network in networks.items()
            if network is not None and wanted
            for path in attention_paths(network)
        ]
        try:
            for who, module in modules:
                watch(module, lambda seen, who=who: self.seen.setdefault(who, []).append(seen))  # type: ignore[misc]
            yield
        finally:
            for _, module in modules:
                watch(module, None)

    def held_out(self) -> dict[str, float]:
        """Means over the held-out rows; the loss is that of the next tokens alone, which decides what is best."""
        found = super().held_out()
        for name, (kind, weight) in (("maps", self.maps), ("entropy", self.entropy)):
            if kind != "off":
                found["loss"] -= weight * found[name]
        return found

    @torch.no_grad()
    def maps_now(self) -> dict[str, list[list[list[float]]]]:
        """Attention maps of the first, middle and last layer on the first tokens of a held-out row, the mean over heads: of the ``student`` and of the ``teacher``, [3, SHOWN, SHOWN]."""
        self.seen = {"student": [], "teacher": []}
        super().terms(self.course.aside[:1])
        found = {}
        for who, every in self.seen.items():
            shown = [every[number] for number in sorted({0, len(every) // 2, len(every) - 1})]
            parts = [attention_map(each, slice(0, min(SHOWN, each.query.shape[2])))[0].mean(0) for each in shown]
            found[who] = [part[:, :SHOWN].mul(1e3).round().div(1e3).tolist() for part in parts]
        self.seen = {}
        return found

    def terms(self, rows: Rows) -> dict[str, Tensor]:
        """Those of the next tokens, and the losses of ``maps`` and of ``entropy``."""
        self.seen = {"student": [], "teacher": []}
        found = super().terms(rows)
        student, teacher = list(self.seen["student"]), list(self.seen["teacher"])
        wanted = torch.zeros_like(rows.learned)
        wanted[:, :-1] = rows.learned[:, 1:]
        for name, (kind, weight), loss in (("maps", self.maps, map_loss), ("entropy", self.entropy, entropy_loss)):
            if kind != "off":
                found[name] = loss(kind, student, teacher, wanted)  # type: ignore[arg-type]
                found["loss"] = found["loss"] + weight * found[name]
        self.seen = {}
        return found


@contextmanager
def learned(
    network: nn.Module, model: BlockModel, formats: dict[str, Format], names: list[str], settings: Settings
) -> Iterator[dict[str, LearnedLinear]]:
    """A network with learned weights in the place of the named layers, and all else frozen, for a while.

    Args:
        network: The transformers model.
        model: The same, block by block: has the weights as stored.
        formats: What the layers round.
        names: The layers, by their full names.
        settings: Type of the steps.

    Yields:
        What stands in their places.
    """
    codes = {} if settings.format or model.checkpoint is None else read_codes(model.checkpoint.folder)
    masks = Masks(model)
    layers: dict[str, LearnedLinear] = {}
    with replaced(network) as put:
        for index in range(len(model.blocks)):
            with model.opened(index) as block:
                weights = {each.name: each.read() for each in block.layers.values() if each.name in names}
            for name, weight in weights.items():
                base, grid, zeros = (
                    network.get_submodule(name),
                    formats.get(name, Format()).weights,
                    masks.removed(name, weight),
                )
                start: tuple[Tensor, Tensor | None] | None = (
                    choose_steps(weight.float(), grid, "mse") if grid and name not in codes else None
                )
                if name in codes:
                    start = codes[name].steps.float(), codes[name].zeros
                layers[name] = LearnedLinear(
                    base,
                    weight,
                    start,
                    grid=grid,
                    step_type=TYPES[settings.step_type],
                    pruned=zeros if bool(zeros.any()) else None,
                ).to(weight.device)
                put(name, layers[name])
        yield layers


@method("qat", title="Quantization-aware training", paper="arXiv 2402.10787", kind="recover", settings=Settings)
def apply(model: Model, tokens: Tensor, *, walk: Walk | None = None, dense: Model | None = None, **settings: object) -> Records:
    """Trains a model that rounds as it runs, and leaves it rounded.

    Args:
        model: The model; one in memory is changed in place.
        tokens: Token ids to learn, [S, T].
        walk: How to walk; its ``parent`` is the dense model, if nothing else says which.
        dense: The dense model, in memory.
        **settings: See ``Settings``.

    Returns:
        One record per layer that was trained.

    Raises:
        Problem: If nothing says what is rounded, on filters that match nothing, a teacher that does not fit, a loss of maps where there is no attention to see, or a loss that
            is not finite.
    """
    chosen, walk = Settings.model_validate(settings), walk or Walk()
    blocks = BlockModel.of(model)
    names = trainable(blocks, chosen.only, chosen.skip)
    formats = _formats(blocks, names, chosen)
    if dense is None and walk.parent is None and not chosen.parent and chosen.format and not _rounds(blocks):
        dense = _as_it_is(blocks)
    course = open_course(blocks, tokens, chosen, walk, dense)
    start_rounding(course.network, formats)
    _check_maps(course.network, course.teacher, chosen)
    with learned(course.network, blocks, formats, names, chosen) as layers:
        text = Imitation(
            course, chosen.distill_weight, chosen.temperature, chosen.at_once,
            maps=(chosen.map_loss, chosen.map_weight), entropy=(chosen.entropy_loss, chosen.entropy_weight),
        )  # fmt: skip
        groups, latents = _groups(layers, chosen), [layer.latent for layer in layers.values()]
        looks = (chosen.map_loss, chosen.entropy_loss) != ("off", "off")
        with text.looking():
            before = text.maps_now() if looks else {}
            history = teach(course, text, groups, chosen, blocks, walk)
            after = text.maps_now() if looks else {}
        walk.training = summary(
            blocks, latents, groups, history, rate=chosen.learning_rate, distilled=course.teacher is not None
        )
        if looks:
            walk.training["maps"] = {"dense": before["teacher"], "before": before["student"], "after": after["student"]}
    return walk_blocks(blocks, tokens, partial(_edit, trained=layers), names, walk=walk, formats=formats)


def _rounds(model: BlockModel) -> bool:
    return model.checkpoint is not None and bool(read_formats(model.checkpoint.folder))


def _as_it_is(model: BlockModel) -> BlockModel:
    """The model as it stands before anything is rounded: its own teacher."""
    if model.checkpoint is None:
        return BlockModel(copy.deepcopy(model.network), model.family, None, model.dtype, model.device)
    return BlockModel.from_folder(model.checkpoint.folder, dtype=model.dtype, device=model.device, allow_generic=True)


def _formats(model: BlockModel, names: list[str], settings: Settings) -> dict[str, Format]:
    """What the modules are to round: what the settings say, or what they round already."""
    if settings.format:
        return formats_of(model, names, parse_format(settings.format))
    found = {} if model.checkpoint is None else read_formats(model.checkpoint.folder)
    if not found:
        raise Problem(
            "Nothing says what is to be rounded.",
            why="no earlier step has rounded anything, and `format` is empty.",
            fix="`format: W4A8 g64`, or a step `gptq` before this one.",
        )
    return found


def _check_maps(student: nn.Module, teacher: nn.Module | None, settings: Settings) -> None:
    """Stops where a loss looks at attention that is not there, or that of another shape."""
    asked = [
        f"{name}: {kind}"
        for name, kind in (("map_loss", settings.map_loss), ("entropy_loss", settings.entropy_loss))
        if kind != "off"
    ]
    if not asked:
        return
    off = " and ".join(f"`{each.partition(':')[0]}: off`" for each in asked)
    if not attention_paths(student):
        raise Problem(
            f"`{asked[0]}` has nothing to look at in {type(student).__name__}.",
            why="it has no attention, or none that transformers lets others take part in.",
            fix=off,
            code=Exit.INCOMPATIBLE,
        )
    if teacher is None:
        raise Problem(
            f"`{asked[0]}` needs the dense model.",
            why="with `objective: ce`, or in a recipe that begins with a rounded model, there is none.",
            fix=f"`parent: MODEL`, or {off}.",
        )
    configs: list[Any] = [student.config, teacher.config]
    heads = [(config.num_hidden_layers, config.num_attention_heads) for config in configs]
    if heads[0] != heads[1] or str(configs[0].model_type).startswith("duramen"):
        raise Problem(
            f"`{asked[0]}` cannot compare {heads[0][0]} layers of {heads[0][1]} heads with {heads[1][0]} of {heads[1][1]}.",
            why="every map is held against the one in its place.",
            fix=f"{off}, or a `parent` of the same shape.",
        )


def _groups(layers: dict[str, LearnedLinear], settings: Settings) -> list[dict[str, Any]]:
    steps = [layer.log_steps for layer in layers.values() if layer.log_steps is not None and settings.step_rate]
    groups = [{"params": [layer.latent for layer in layers.values()], "lr": settings.learning_rate}]
    return groups + ([{"params": steps, "lr": settings.step_rate}] if steps else [])


def _edit(
    layers: list[Layer], statistics: Statistics, *, trained: dict[str, LearnedLinear]
) -> Callable[[Layer], dict[str, Any]]:
    """Writes the codes and what they stand for; it must be what the network was trained with, bit for bit."""

    @torch.no_grad()
    def write(layer: Layer) -> dict[str, Any]:
        module, before = trained[layer.name], layer.read()
        quantized = module.quantized()
        weight = module.weight() if quantized is None else quantized.weight()
        if not torch.equal(weight, module.weight()):
            raise Problem(
                f"The codes of {layer.name} are not what it was trained with.",
                why="this cannot be.",
                fix="please report it with the recipe.",
                code=Exit.CHECK_FAILED,
            )
        new = weight.to(before.dtype)
        layer.write(new, pruned=module.pruned)  # type: ignore[arg-type]
        layer.quantized = quantized
        second = statistics.total.second
        whole = max(output_error(before, torch.zeros_like(before), second), 1e-30)
        record = {
            "removed": 0 if module.pruned is None else int(module.pruned.sum()), "size": new.numel(),  # type: ignore[operator]
            "relative_error": output_error(before, new, second) / whole, "seconds": 0.0,
        }  # fmt: skip
        return record if quantized is None else record | {"bits": quantized.bits, "code_entropy": code_entropy(quantized.codes)}

    return write
