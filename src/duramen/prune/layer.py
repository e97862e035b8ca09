"""Prunes the layers of one stage: what they share, the choice of a damping, the target, the bias, the errors."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor

from duramen.calibrate.statistics import Statistics
from duramen.families.model import Layer
from duramen.prune.factor import factorise
from duramen.prune.pattern import lasting_zeros
from duramen.prune.pruned import Pruned
from duramen.prune.reconstruct import compute_dtype, output_error, reconstruct, target_weight

PruneFunction = Callable[..., Pruned]
Damping = Annotated[float, Field(ge=0)] | Literal["held-out"]
HeldOut = Annotated[float, Field(gt=0, le=0.5)]
DampingGrid = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)]
GRID = (0.001, 0.01, 0.03, 0.1, 0.3)
"""Candidates for a damping, unless others are given."""
UNTRIED = 0.01
"""The published damping, where no sequence is set aside to choose one by."""


@runtime_checkable
class Solve(Protocol):
    """The settings that decide how a layer is solved; some methods have a ``damping`` and a ``bias`` too."""

    @property
    def damping_grid(self) -> tuple[float, ...]:
        """Candidates for ``damping: held-out``."""

    @property
    def alpha(self) -> float:
        """Share of the dense model's output in the target."""

    @property
    def options(self) -> dict[str, Any]:
        """What goes to the pruning function as it is."""

    @property
    def trial(self) -> dict[str, Any]:
        """Options that differ while dampings are compared."""


@dataclass(frozen=True)
class Stage:
    """What the layers of one stage share.

    Attributes:
        statistics: Of their inputs.
        gram: Of the inputs that the method solves on, [I, I]; about their mean where biases are corrected.
        cross: Dense by edited inputs in the same way, [I, I]; only with a dense target.
        with_bias: Whether biases are corrected: all layers have one.
        options: The damping, and the factorised Gram that goes with it, for methods that have one.
        report: For the records.
    """

    statistics: Statistics
    gram: Tensor
    cross: Tensor | None
    with_bias: bool
    options: dict[str, Any]
    report: dict[str, float]


def prepare(
    prune: PruneFunction, layers: list[Layer], statistics: Statistics, settings: Solve, target: dict[str, Any]
) -> Stage:
    """Does once for a stage what its layers have in common: centring, the choice of a damping, the factorisation.

    Args:
        prune: The pruning function.
        layers: The layers of the stage.
        statistics: Of the inputs that they share.
        settings: The method's settings.
        target: ``sparsity`` and ``pattern`` at which dampings are compared.
    """
    with_bias = getattr(settings, "bias", "off") == "auto" and all(layer.bias is not None for layer in layers)
    total, dense, cross = statistics.total, statistics.dense, statistics.cross
    gram = total.about(total.mean) if with_bias else total.second
    if with_bias and cross is not None and dense is not None:
        cross = cross - torch.outer(dense.first, total.mean)
    damping, report = getattr(settings, "damping", None), {}
    if damping == "held-out" and statistics.held_out is not None and not statistics.held_out.count:
        damping = UNTRIED
    elif damping == "held-out":
        stride = max(1, sum(len(layer.read()) for layer in layers) // 128)
        rows = torch.cat([layer.read()[::stride] for layer in layers])
        trial = settings.options | target | settings.trial
        damping, report["held_out_error"] = choose_damping(
            prune, rows, statistics, settings.damping_grid, trial, with_bias=with_bias
        )
    options = {}
    if damping is not None:
        options = {"damping": damping, "factor": factorise(gram, damping, dtype=compute_dtype(layers[0].read()))}
    return Stage(statistics, gram, cross, with_bias, options, report)


def prune_layer(prune: PruneFunction, layer: Layer, stage: Stage, settings: Solve, target: dict[str, Any]) -> dict[str, Any]:
    """Prunes one layer of a stage to its target (``sparsity``, ``pattern``), or rounds it, and returns its record."""
    start, weight = time.perf_counter(), layer.read()
    wanted = aim(weight, stage, settings.alpha)
    found = prune(wanted, stage.gram, **settings.options, **target, **stage.options)
    found = replace(found, weight=found.weight.to(weight.dtype))
    bias = corrected_bias(layer, found.weight, stage.statistics, settings.alpha) if stage.with_bias else None
    no_mask = found.quantized is not None and not bool(found.pruned.any())
    layer.write(found.weight, pruned=None if no_mask else found.pruned, bias=bias)
    layer.quantized = found.quantized
    return (
        found.report
        | stage.report
        | errors(layer, found, bias, stage, shifted=wanted is not weight)
        | {
            "removed": int(found.pruned.sum()),
            "size": weight.numel(),
            "seconds": time.perf_counter() - start,
        }
    )


def aim(weight: Tensor, stage: Stage, alpha: float) -> Tensor:
    """What a weight [O, I] of a stage is to come near to: itself, or what stands for α of the dense model's output; [O, I]."""
    if not alpha or stage.cross is None:
        return weight
    factor = stage.options["factor"]
    wanted = target_weight(weight, stage.gram, stage.cross, alpha=alpha, factor=factor)
    zeros = lasting_zeros(weight)
    if bool(zeros.any()):  # among weights that are zero there, the same problem
        wanted = reconstruct(wanted, stage.gram, zeros, factor=factor).weight
    return wanted


def corrected_bias(layer: Layer, weight: Tensor, statistics: Statistics, alpha: float) -> Tensor:
    """The bias that makes up for the mean change of a layer's outputs (method sheet, 2.11).

    b̂ = b + Wμ − Ŵμ̂ with μ̂ the mean of the edited and μ = α·mean(x) + (1−α)·μ̂ of the target's inputs.

    Args:
        layer: Has the dense W [O, I] and b [O].
        weight: Ŵ, [O, I].
        statistics: Of its inputs.
        alpha: 0 fits the dense layer on the edited inputs, 1 the output of the dense model.
    """
    assert layer.bias is not None
    edited = statistics.total.mean
    wanted = edited if statistics.dense is None else alpha * statistics.dense.mean + (1 - alpha) * edited
    old, new, bias = (tensor.to(edited.dtype) for tensor in (layer.read(), weight, layer.bias))
    return (bias + old @ wanted - new @ edited).to(layer.bias.dtype)


def errors(layer: Layer, found: Pruned, bias: Tensor | None, stage: Stage, *, shifted: bool) -> dict[str, float]:
    """How far a layer's outputs moved on the tokens seen, as shares of the squared output without the bias.

    Args:
        layer: Has the dense W [O, I] and bias.
        found: What the method made of it.
        bias: Its new bias, [O]; None if it did not change.
        stage: Statistics of its inputs, and the Gram that the method solved on.
        shifted: Whether the method was given other weights than W to come near to.

    Returns:
        ``relative_error``: what this layer alone changes, old and new weights on the inputs that the edited model feeds it; about
        the mean, if only a bias makes up for it. With the dense model's inputs at hand also ``dense_error``: the distance from
        the output of the dense model, to which the layers before it have added theirs (method sheet, 2.12).
    """
    statistics, weight = stage.statistics, layer.read()
    total, dense, cross = statistics.total, statistics.dense, statistics.cross
    own = output_error(weight, found.weight, stage.gram) if shifted else found.error
    report = {"relative_error": own / max(output_error(weight, torch.zeros_like(weight), total.second), 1e-30)}
    if dense is None or cross is None:
        return report
    old, new = weight.double(), found.weight.double()
    whole = float(((old @ dense.second.double()) * old).sum())
    changed = float(((new @ total.second.double() - 2 * (old @ cross.double())) * new).sum()) + whole
    if bias is not None and layer.bias is not None:
        shift, drift = (bias - layer.bias).double(), new @ total.mean.double() - old @ dense.mean.double()
        changed += total.count * float((shift * (2 * drift + shift)).sum())
    return report | {"dense_error": changed / max(whole, 1e-30)}


def choose_damping(
    prune: PruneFunction,
    rows: Tensor,
    statistics: Statistics,
    grid: tuple[float, ...],
    options: dict[str, Any],
    *,
    with_bias: bool = False,
) -> tuple[float, float]:
    """Picks the damping with the least error on held-out sequences.

    Args:
        prune: The pruning function; it sees only the sequences that are not held out.
        rows: Some rows of the weights, [O, I].
        statistics: Train and held-out sums.
        grid: Candidates.
        options: Other settings of the pruning function.
        with_bias: Whether a bias makes up for the mean change, as the sequences that are not held out have it.

    Returns:
        The damping and its relative held-out error.
    """
    assert statistics.held_out is not None
    train, held_out = statistics.train, statistics.held_out
    centre = train.mean if with_bias else torch.zeros_like(train.mean)
    seen, unseen = train.about(centre), held_out.about(centre)
    whole = max(output_error(rows, torch.zeros_like(rows), held_out.second), 1e-30)
    errors = [output_error(rows, prune(rows, seen, damping=p, **options).weight, unseen) / whole for p in grid]
    best = min(range(len(grid)), key=errors.__getitem__)
    return grid[best], errors[best]
