"""Applies a pruning function on matrices to every linear layer of a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from duramen.calibrate.statistics import Statistics
from duramen.calibrate.walker import Records, Walk, walk_blocks
from duramen.families.model import BlockModel, Layer
from duramen.families.select import filter_layers
from duramen.prune.pattern import parse_pattern
from duramen.prune.pruned import Pruned
from duramen.prune.reconstruct import output_error, target_weight
from duramen.registry import Settings

Model = BlockModel | nn.Module
PruneFunction = Callable[..., Pruned]
OWN = {"sparsity", "pattern", "only", "skip", "damping", "damping_grid", "held_out", "dense_target"}
"""Settings that this file handles; all others go to the pruning function as they are."""


class PruneSettings(Settings):
    """What every pruning method takes."""

    sparsity: float | tuple[float, ...] | None = None
    """Share of weights to remove, in [0, 1); a list is a gradient over the blocks, from the first to the last."""
    pattern: str | None = None
    """`kept:group`, such as `2:4`: of every group of consecutive inputs so many stay."""
    only: tuple[str, ...] = ()
    """Layers to touch, by role (`q`), block range (`blocks:4-27`) or glob (`*.mlp.*`); empty means all."""
    skip: tuple[str, ...] = ()
    """Layers to leave alone, in the same words."""
    held_out: float = Field(default=0.125, gt=0, le=0.5)
    """Share of the calibration sequences that are held out where `damping: held-out` needs them."""
    damping_grid: tuple[float, ...] = (0.001, 0.01, 0.03, 0.1, 0.3)
    """Candidates for `damping: held-out`."""

    @property
    def trial(self) -> dict[str, Any]:
        """Settings of the pruning function that differ while dampings are compared."""
        return {}

    @property
    def products(self) -> int:
        """About how many products [O, I]·[I, I] one layer takes."""
        return 0

    @model_validator(mode="after")
    def _check_target(self) -> PruneSettings:
        for share in self.sparsity if isinstance(self.sparsity, tuple) else (self.sparsity,):
            parse_pattern(share, self.pattern)
        return self

    def at(self, block: int, num_blocks: int) -> dict[str, float | str | None]:
        """The target of one block: ``sparsity`` and ``pattern`` for the pruning function."""
        if not isinstance(self.sparsity, tuple):
            return {"sparsity": self.sparsity, "pattern": self.pattern}
        place = block / max(num_blocks - 1, 1) * (len(self.sparsity) - 1)
        low = min(int(place), len(self.sparsity) - 1)
        high = min(low + 1, len(self.sparsity) - 1)
        return {"sparsity": self.sparsity[low] + (place - low) * (self.sparsity[high] - self.sparsity[low]), "pattern": None}


def prune_model(
    prune: PruneFunction, model: Model, tokens: Tensor, settings: PruneSettings, *, walk: Walk | None = None
) -> Records:
    """Prunes the linear weights of all blocks; embeddings, head, norms and biases stay as they are.

    Args:
        prune: A function with the signature of ``duramen.prune.multiweight.prune``.
        model: A loaded transformers model (edited in place) or a ``BlockModel``.
        tokens: Calibration token ids, [S, T].
        settings: The method's settings.
        walk: How to walk; None for the defaults.

    Returns:
        One record per layer, with its relative errors and counts.

    Raises:
        Problem: On filters that match nothing, damaged weights, or activations that are not finite.
    """
    blocks = model if isinstance(model, BlockModel) else BlockModel.from_module(model)
    names = filter_layers(blocks.layer_names(), settings.only, settings.skip)
    alpha = float(getattr(settings, "dense_target", 0.0))
    choose = getattr(settings, "damping", None) == "held-out"

    def edit(layer: Layer, statistics: Statistics) -> dict[str, Any]:
        return prune_layer(prune, layer, statistics, settings, len(blocks.blocks))

    return walk_blocks(
        blocks, tokens, edit, names, walk=walk or Walk(),
        held_out_every=round(1 / settings.held_out) if choose else 0, dense_target=alpha > 0,
    )  # fmt: skip


def prune_layer(
    prune: PruneFunction, layer: Layer, statistics: Statistics, settings: PruneSettings, num_blocks: int
) -> dict[str, Any]:
    """Prunes one layer and returns its record."""
    start = time.perf_counter()
    weight, damping = layer.read(), getattr(settings, "damping", None)
    options = settings.at(layer.block, num_blocks) | {
        name: getattr(settings, name) for name in type(settings).model_fields if name not in OWN
    }
    report: dict[str, Any] = {}
    if damping == "held-out":
        damping, report["held_out_error"] = choose_damping(
            prune, weight, statistics, settings.damping_grid, options | settings.trial
        )
    if damping is not None:
        options["damping"] = damping
    target = _target(weight, statistics, float(getattr(settings, "dense_target", 0.0)), damping or 0.01)
    found = prune(target, statistics.total, **options)
    found = replace(found, weight=found.weight.to(weight.dtype))
    layer.write(found.weight, pruned=found.pruned)
    report |= {
        "relative_error": relative_error(weight, found.weight, statistics),
        "removed": int(found.pruned.sum()),
        "size": weight.numel(),
        "seconds": time.perf_counter() - start,
    }
    return found.report | report


def _target(weight: Tensor, statistics: Statistics, alpha: float, damping: float) -> Tensor:
    if alpha == 0 or statistics.cross is None:
        return weight
    return target_weight(weight.float(), statistics.total, statistics.cross, alpha=alpha, damping=damping)


def relative_error(weight: Tensor, edited: Tensor, statistics: Statistics) -> float:
    """Squared output change over squared output, on the tokens seen.

    With the dense model's inputs at hand both outputs are compared as the two models compute them (method sheet, 2.12);
    else both are taken on the edited inputs.
    """
    gram = statistics.total
    if statistics.cross is None or statistics.dense is None:
        whole = output_error(weight, torch.zeros_like(weight), gram)
        return output_error(weight, edited, gram) / max(whole, 1e-30)
    dense, new = weight.double(), edited.double()
    whole = float(((dense @ statistics.dense.double()) * dense).sum())
    mixed = float(((dense @ statistics.cross.double()) * new).sum())
    return (float(((new @ gram.double()) * new).sum()) - 2 * mixed + whole) / max(whole, 1e-30)


def choose_damping(
    prune: PruneFunction, weight: Tensor, statistics: Statistics, grid: tuple[float, ...], options: dict[str, Any]
) -> tuple[float, float]:
    """Picks the damping with the least error on held-out sequences, on at most 128 rows of the weight.

    Args:
        prune: The pruning function; it sees only the sequences that are not held out.
        weight: [O, I].
        statistics: Train and held-out sums.
        grid: Candidates.
        options: Other settings of the pruning function.

    Returns:
        The damping and its relative held-out error.
    """
    assert statistics.held_out is not None
    rows = weight[:: max(1, len(weight) // 128)][:128]
    train, held_out = statistics.train, statistics.held_out
    whole = max(output_error(rows, torch.zeros_like(rows), held_out), 1e-30)
    errors = [output_error(rows, prune(rows, train, damping=p, **options).weight, held_out) / whole for p in grid]
    best = min(range(len(grid)), key=errors.__getitem__)
    return grid[best], errors[best]
