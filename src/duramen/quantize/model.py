"""Applies a rounding function on matrices to every linear layer of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from duramen.attention import attention_paths
from duramen.calibrate.statistics import Statistics
from duramen.calibrate.walker import Records, Walk, walk_blocks
from duramen.families.model import BlockModel, Layer, Model
from duramen.families.select import filter_layers
from duramen.grids import Format, Quantized, parse_format
from duramen.problem import Exit, Problem
from duramen.prune.layer import GRID, DampingGrid, HeldOut, PruneFunction, prepare, prune_layer
from duramen.prune.masks import Masks
from duramen.prune.pruned import Pruned
from duramen.prune.reconstruct import output_error
from duramen.quantize.allocation import choose_widths, survey
from duramen.quantize.steps import Step
from duramen.registry import Settings
from duramen.rounding import start_rounding
from duramen.rundir import read_formats

OWN = {"format", "mean_bits", "widths", "only", "skip", "damping", "damping_grid", "held_out", "dense_target", "step_type"}
"""Settings that this file handles; all others go to the rounding function as they are."""
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class QuantizeSettings(Settings):
    """What every method of quantization takes."""

    format: str = "W4 g64"
    """What is rounded: `W4A8KV8` are bits of weights, of the inputs that they meet (by token; `A8g32` by so many channels of it) and of keys and values, each of which may be left out; then for weights what shares a step, `row`, `tensor` or `gN` consecutive inputs, and `affine` for a zero point or `narrow` to leave the lowest code out; `sinksN` lets the keys and values of the first tokens be."""
    mean_bits: Annotated[float, Field(gt=0)] | None = None
    """Bits per weight over all layers, steps included, under which the widths of layers are chosen; those of the format's weights are then not used. Null for one width."""
    widths: Annotated[tuple[Annotated[int, Field(ge=2, le=8)], ...], Field(min_length=1)] = (2, 3, 4, 5, 6, 8)
    """What may be chosen, where `mean_bits` says so."""
    step: Step = "weighted"
    """How steps are chosen: from the largest weight (`absmax`), or by the squared error of rounding (`mse`), weighted by the inputs (`weighted`)."""
    step_type: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type that steps are stored in; codes are those for the stored steps."""
    only: tuple[str, ...] = ()
    """Layers to touch, by role (`q`), block range (`blocks:4-27`) or glob (`*.mlp.*`); empty means all."""
    skip: tuple[str, ...] = ()
    """Layers to leave alone, in the same words."""
    held_out: HeldOut = 0.125
    """Share of the calibration sequences that are held out where `damping: held-out` needs them."""
    damping_grid: DampingGrid = GRID
    """Candidates for `damping: held-out`."""

    @field_validator("format")
    @classmethod
    def _is_a_format(cls, value: str) -> str:
        return parse_format(value).text

    @model_validator(mode="after")
    def _widths_are_of_weights(self) -> QuantizeSettings:
        if self.mean_bits is not None and parse_format(self.format).weights is None:
            raise ValueError(f"`mean_bits` is a budget of weights, which `format: {self.format}` leaves as they are")
        return self

    @property
    def alpha(self) -> float:
        """Share of the dense model's output in the target; 0 where a method has no such target."""
        return 0.0

    @property
    def trial(self) -> dict[str, Any]:
        """Settings of the rounding function that differ while dampings are compared."""
        return {}

    @property
    def products(self) -> int:
        """About how many products [O, I]·[I, I] one layer takes."""
        return 0

    @property
    def options(self) -> dict[str, Any]:
        """What goes to the rounding function beside the grid."""
        own = {name: getattr(self, name) for name in type(self).model_fields if name not in OWN}
        return own | {"step_type": TYPES[self.step_type]}

    @property
    def leaves(self) -> tuple[str, ...]:
        """See ``duramen.order``."""
        wanted = parse_format(self.format)
        return ("codes",) * (wanted.weights is not None) + ("rounding",) * wanted.runs

    @property
    def undoes(self) -> tuple[str, ...]:
        """See ``duramen.order``."""
        return ("reduction",)


def finish(weight: Tensor, quantized: Quantized, gram: Tensor, pruned: Bool[Tensor, "O I"], **report: float) -> Pruned:
    """What the codes stand for, in the weight's type, with its error and its bits; ``pruned`` are the zeros that had to stay."""
    rounded = quantized.weight().to(weight.dtype)
    report |= {"bits": quantized.bits}
    return Pruned(rounded, pruned, output_error(weight, rounded, gram), report, quantized)


def quantize_model(
    quantize: PruneFunction, model: Model, tokens: Tensor, settings: QuantizeSettings, *, walk: Walk | None = None
) -> Records:
    """Rounds what the format says of the linear layers and the attention of all blocks; embeddings, head, norms and biases stay as they are.

    A layer's weights are fitted on its inputs as they are rounded.

    Args:
        quantize: A function with the signature of ``duramen.quantize.gptq.quantize``.
        model: A loaded transformers model (edited in place) or a ``BlockModel``.
        tokens: Calibration token ids, [S, T].
        settings: The method's settings.
        walk: How to walk; None for the defaults.

    Returns:
        One record per layer, with its relative errors and bits.

    Raises:
        Problem: On filters that match nothing, groups that do not fit, layers or attention whose inputs, keys or values cannot be reached, damaged weights, or
            activations that are not finite.
    """
    blocks, wanted = BlockModel.of(model), parse_format(settings.format)
    names = filter_layers(blocks.layer_names(), settings.only, settings.skip)
    formats = formats_of(blocks, names, wanted)
    choose, walk, masks = getattr(settings, "damping", None) == "held-out", walk or Walk(), Masks(blocks)
    if settings.mean_bits is not None:
        widths = walk.memo("widths", lambda: _widths(blocks, tokens, settings, names, walk))
        formats |= {name: replace(formats[name], weights=replace(wanted.weights, bits=bits)) for name, bits in widths.items()}  # type: ignore[type-var]

    def edit(layers: list[Layer], statistics: Statistics) -> Callable[[Layer], dict[str, Any]]:
        stage = prepare(quantize, layers, statistics, settings, {"grid": formats[layers[0].name].weights})

        def rounded(layer: Layer) -> dict[str, Any]:
            target = {"grid": formats[layer.name].weights, "pruned": masks.removed(layer.name, layer.read())}
            return prune_layer(quantize, layer, stage, settings, target)

        return rounded

    records = walk_blocks(
        blocks, tokens, edit, names if wanted.weights else [], walk=walk,
        held_out_every=round(1 / settings.held_out) if choose else 0, dense_target=settings.alpha > 0, formats=formats,
    )  # fmt: skip
    if blocks.checkpoint is None:
        start_rounding(blocks.network, formats)  # also in blocks that nothing made the walk go through
    return records


def _widths(blocks: BlockModel, tokens: Tensor, settings: QuantizeSettings, names: list[str], walk: Walk) -> dict[str, int]:
    """The width of every layer under the budget, from a walk through the model as it is."""
    grid, budget = parse_format(settings.format).weights, settings.mean_bits
    assert grid is not None
    assert budget is not None

    def look(_: list[Layer], statistics: Statistics) -> Callable[[Layer], dict[str, Any]]:
        return lambda layer: survey(layer, statistics, grid, settings.widths, settings.step, TYPES[settings.step_type])

    looking = replace(walk, store=None, progress=lambda record: None)
    return choose_widths(walk_blocks(blocks, tokens, look, names, walk=looking), settings.widths, budget)


def _also(wanted: Format, before: Format | None) -> Format:
    """A format, with what an earlier one rounds beside it."""
    if before is None:
        return wanted
    return Format(wanted.weights or before.weights, wanted.inputs or before.inputs, wanted.cache or before.cache)


def formats_of(model: BlockModel, names: Sequence[str], wanted: Format) -> dict[str, Format]:
    """What the named layers, and the attention of their blocks, round; what an earlier step has made them round they still do.

    Raises:
        Problem: On groups that do not fit, or layers or attention whose inputs, keys or values cannot be reached.
    """
    layer, where = replace(wanted, cache=None), model.layer_names()
    for name in names:
        inputs = model.shape(name)[1]
        if wanted.weights:
            wanted.weights.width(inputs, name)
        if wanted.inputs:
            wanted.inputs.grid.width(inputs, name)
        if wanted.inputs and model.tapped(name):
            raise Problem(
                f"The inputs of {name} cannot be rounded.",
                why="its block reads the weight without calling the layer.",
                fix=f"leave such layers out (`skip: [{where[name][0]}]`), or a format without `A`.",
            )
    before = {} if model.checkpoint is None else read_formats(model.checkpoint.folder)
    found = {name: _also(layer, before.get(name)) for name in names} if layer != Format() else {}
    if wanted.cache:
        touched = tuple(f"{model.family.blocks}.{block}." for block in {where[name][1] for name in names})
        inside = [path for path in attention_paths(model.network) if path.startswith(touched)]
        if not inside:
            raise Problem(
                f"No keys and values of {type(model.network).__name__} can be rounded.",
                why="it has no attention there, or none that transformers lets others take part in.",
                fix="a format without `KV`.",
                code=Exit.INCOMPATIBLE,
            )
        found |= dict.fromkeys(inside, Format(cache=wanted.cache))
    return found
