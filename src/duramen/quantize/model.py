"""Applies a rounding function on matrices to every linear layer of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool
from pydantic import field_validator
from torch import Tensor

from duramen.calibrate.statistics import Statistics
from duramen.calibrate.walker import Records, Walk, walk_blocks
from duramen.families.model import BlockModel, Layer, Model
from duramen.families.select import filter_layers
from duramen.grids import Quantized, parse_grid
from duramen.prune.layer import GRID, DampingGrid, HeldOut, PruneFunction, prepare, prune_layer
from duramen.prune.pruned import Pruned
from duramen.prune.reconstruct import output_error
from duramen.quantize.steps import Step
from duramen.registry import Settings

OWN = {"grid", "only", "skip", "damping", "damping_grid", "held_out", "dense_target", "step_type"}
"""Settings that this file handles; all others go to the rounding function as they are."""
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class QuantizeSettings(Settings):
    """What every method of quantization takes."""

    grid: str = "W4 g64"
    """`W` with 2 to 8 bits; what shares a step: `row`, `tensor` or `gN` consecutive inputs; then `affine` for a zero point, or `narrow` to leave the lowest code out."""
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

    @field_validator("grid")
    @classmethod
    def _is_a_grid(cls, value: str) -> str:
        return parse_grid(value).text

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
        """What goes to the rounding function."""
        own = {name: getattr(self, name) for name in type(self).model_fields if name not in OWN}
        return own | {"grid": parse_grid(self.grid), "step_type": TYPES[self.step_type]}


def finish(weight: Tensor, quantized: Quantized, gram: Tensor, pruned: Bool[Tensor, "O I"], **report: float) -> Pruned:
    """What the codes stand for, in the weight's type, with its error and its bits; ``pruned`` are the zeros that had to stay."""
    rounded = quantized.weight().to(weight.dtype)
    report |= {"bits": quantized.bits}
    return Pruned(rounded, pruned, output_error(weight, rounded, gram), report, quantized)


def quantize_model(
    quantize: PruneFunction, model: Model, tokens: Tensor, settings: QuantizeSettings, *, walk: Walk | None = None
) -> Records:
    """Rounds the linear weights of all blocks; embeddings, head, norms and biases stay as they are.

    Args:
        quantize: A function with the signature of ``duramen.quantize.gptq.quantize``.
        model: A loaded transformers model (edited in place) or a ``BlockModel``.
        tokens: Calibration token ids, [S, T].
        settings: The method's settings.
        walk: How to walk; None for the defaults.

    Returns:
        One record per layer, with its relative errors and bits.

    Raises:
        Problem: On filters that match nothing, groups that do not fit, damaged weights, or activations that are not finite.
    """
    blocks, grid = BlockModel.of(model), parse_grid(settings.grid)
    names = filter_layers(blocks.layer_names(), settings.only, settings.skip)
    for name in names:
        grid.width(blocks.shape(name)[1], name)
    choose = getattr(settings, "damping", None) == "held-out"

    def edit(layers: list[Layer], statistics: Statistics) -> Callable[[Layer], dict[str, Any]]:
        stage = prepare(quantize, layers, statistics, settings, {})
        return lambda layer: prune_layer(quantize, layer, stage, settings, {})

    return walk_blocks(
        blocks, tokens, edit, names, walk=walk or Walk(),
        held_out_every=round(1 / settings.held_out) if choose else 0, dense_target=settings.alpha > 0,
    )  # fmt: skip
