"""Applies a pruning function on matrices to every linear layer of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from pydantic import model_validator
from torch import Tensor

from duramen.calibrate.statistics import Statistics
from duramen.calibrate.walker import Records, Walk, walk_blocks
from duramen.families.model import BlockModel, Layer, Model
from duramen.families.select import filter_layers
from duramen.problem import Problem
from duramen.prune.allocation import Allocation, allocate, survey
from duramen.prune.layer import GRID, DampingGrid, HeldOut, PruneFunction, prepare, prune_layer
from duramen.prune.pattern import parse_pattern
from duramen.registry import Settings

OWN = {"sparsity", "pattern", "allocation", "only", "skip", "damping", "damping_grid", "held_out", "dense_target", "bias"}
"""Settings that this file handles; all others go to the pruning function as they are."""


class PruneSettings(Settings):
    """What every pruning method takes."""

    sparsity: float | tuple[float, ...] | None = None
    """Share of weights to remove, in [0, 1); a list is a gradient over the blocks, from the first to the last."""
    pattern: str | None = None
    """`kept:group`, such as `2:4`: of every group of consecutive inputs so many stay."""
    allocation: Allocation | Literal["auto"] = "auto"
    """How a share is spread over the layers: equally (`uniform`), by their outliers (`owl`), or by their error curves (`curve`); the total stays exact. `auto`: equally, but by outliers in multi-weight pruning with `effort: best`."""
    only: tuple[str, ...] = ()
    """Layers to touch, by role (`q`), block range (`blocks:4-27`) or glob (`*.mlp.*`); empty means all."""
    skip: tuple[str, ...] = ()
    """Layers to leave alone, in the same words."""
    held_out: HeldOut = 0.125
    """Share of the calibration sequences that are held out where `damping: held-out` needs them."""
    damping_grid: DampingGrid = GRID
    """Candidates for `damping: held-out`."""

    @property
    def alpha(self) -> float:
        """Share of the dense model's output in the target; 0 where a method has no such target."""
        return 0.0

    @property
    def spread(self) -> Allocation:
        """The allocation that is used."""
        return "uniform" if self.allocation == "auto" else self.allocation

    @property
    def trial(self) -> dict[str, Any]:
        """Settings of the pruning function that differ while dampings are compared."""
        return {}

    @property
    def products(self) -> int:
        """About how many products [O, I]·[I, I] one layer takes."""
        return 0

    @property
    def options(self) -> dict[str, Any]:
        """The fields of the method itself."""
        return {name: getattr(self, name) for name in type(self).model_fields if name not in OWN}

    @model_validator(mode="after")
    def _check_target(self) -> PruneSettings:
        if self.sparsity == ():
            raise Problem(
                "`sparsity` is an empty list.",
                why="it says how much goes from the first block to the last.",
                fix="`sparsity: 0.5`",
            )
        for share in self.sparsity if isinstance(self.sparsity, tuple) else (self.sparsity,):
            parse_pattern(share, self.pattern)
        if self.spread != "uniform" and not isinstance(self.sparsity, float):
            raise Problem(
                f"`allocation: {self.spread}` needs one share of weights.",
                why="an N:M pattern fixes the share of every layer, and a gradient over the blocks is an allocation already.",
                fix="`sparsity: 0.5`, or `allocation: uniform`.",
            )
        return self

    def at(self, block: int, num_blocks: int) -> dict[str, float | str | None]:
        """The target of one block: ``sparsity`` and ``pattern`` for the pruning function."""
        if not isinstance(self.sparsity, tuple):
            return {"sparsity": self.sparsity, "pattern": self.pattern}
        place = block / max(num_blocks - 1, 1) * (len(self.sparsity) - 1)
        low = min(int(place), len(self.sparsity) - 1)
        high = min(low + 1, len(self.sparsity) - 1)
        return {"sparsity": self.sparsity[low] + (place - low) * (self.sparsity[high] - self.sparsity[low]), "pattern": None}

    @property
    def leaves(self) -> tuple[str, ...]:
        """See ``duramen.order``."""
        return ("zeros", "pattern") if self.pattern else ("zeros",)

    @property
    def undoes(self) -> tuple[str, ...]:
        """See ``duramen.order``."""
        named = bool(self.only or self.skip)  # then only those layers lose their codes, which is what was asked for
        return ("reduction",) if named else ("codes", "reduction")


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
    blocks = BlockModel.of(model)
    names = filter_layers(blocks.layer_names(), settings.only, settings.skip)
    choose = getattr(settings, "damping", None) == "held-out"
    walk = walk or Walk()
    uniform = settings.spread == "uniform"
    shares = {} if uniform else walk.memo("allocation", lambda: _shares(prune, blocks, tokens, settings, names, walk))

    def edit(layers: list[Layer], statistics: Statistics) -> Callable[[Layer], dict[str, Any]]:
        target = settings.at(layers[0].block, len(blocks.blocks))
        stage = prepare(prune, layers, statistics, settings, target)
        return lambda layer: prune_layer(
            prune, layer, stage, settings, target | ({"sparsity": shares[layer.name]} if shares else {})
        )

    return walk_blocks(
        blocks, tokens, edit, names, walk=walk,
        held_out_every=round(1 / settings.held_out) if choose else 0, dense_target=settings.alpha > 0,
    )  # fmt: skip


def _shares(
    prune: PruneFunction, blocks: BlockModel, tokens: Tensor, settings: PruneSettings, names: list[str], walk: Walk
) -> dict[str, float]:
    """The share of every layer, from a walk through the dense model."""
    assert isinstance(settings.sparsity, float)
    share, kind = settings.sparsity, settings.spread
    trial = partial(prune, **settings.options | settings.trial)

    def look(_: list[Layer], statistics: Statistics) -> Callable[[Layer], dict[str, Any]]:
        return lambda layer: survey(layer, statistics, trial, share=share, allocation=kind)

    looking = replace(walk, store=None, progress=lambda record: None)
    return allocate(walk_blocks(blocks, tokens, look, names, walk=looking), share, kind)
