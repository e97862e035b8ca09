"""Closed-form refit: the weights that are left move to where every layer comes nearest to the dense model's outputs; no gradients.

For masks that were chosen without solving anything (magnitude, Wanda, foreign ones) and for cuts that were not repaired. Every layer is fitted,
from the inputs that the edited model really feeds it, to what the dense model's layer would make of them and, to a part, to what it
makes of its own, so that later layers make up for what earlier ones lost. The whole of that (method sheet of RoRA, 2.6) fits the calibration text and harms
others. A layer moves only if sequences that it was not fitted to say that it should.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from duramen.calibrate.statistics import Statistics
from duramen.calibrate.walker import Records, Walk, set_aside, walk_blocks
from duramen.families.model import BlockModel, Layer, Model
from duramen.families.select import filter_layers
from duramen.problem import Exit, Problem
from duramen.prune.factor import Factor, factorise
from duramen.prune.layer import GRID, Damping, DampingGrid, HeldOut
from duramen.prune.masks import Masks
from duramen.prune.pattern import SPARSE_FROM
from duramen.prune.reconstruct import compute_dtype, reconstruct
from duramen.registry import Place, method
from duramen.registry import Settings as MethodSettings
from duramen.shrink.groups import find_units
from duramen.shrink.plan import PLAN, Plan, digest
from duramen.train.models import find_parent

TRIAL_ROWS = 128
"""Outputs of a layer on which dampings are compared."""


class Settings(MethodSettings):
    """Settings of the refit."""

    parent: Place = ""
    """The dense model: folder, embedded name, GGUF file or hub id; empty for the model that the recipe began with."""
    damping: Damping = "held-out"
    """λ as a share of the mean diagonal of the Gram, which holds the weights back; `held-out` chooses it on held-out sequences."""
    held_out: HeldOut = 0.125
    """Share of the calibration sequences that are held out: they choose the damping, and whether a layer moves at all."""
    damping_grid: DampingGrid = GRID
    """Candidates for `damping: held-out`."""
    dense_target: Annotated[float, Field(ge=0, le=1)] = 0.25
    """How much of what earlier layers lost a layer makes up for: 0 fits it to the dense weights on the edited inputs, 1 to the dense outputs."""
    everything: bool = False
    """Whether to refit layers too that lost nothing themselves, so that they make up for those before them."""
    only: tuple[str, ...] = ()
    """Layers to refit, by role (`down`), block range (`blocks:4-27`) or glob; empty means all."""
    skip: tuple[str, ...] = ()
    """Layers that stay, in the same words."""

    @property
    def undoes(self) -> tuple[str, ...]:
        """See ``duramen.order``."""
        return ("codes", "reduction")


def refit(
    weight: Float[Tensor, "O I"],
    goal: Float[Tensor, "O J"],
    cross: Float[Tensor, "J I"],
    pruned: Bool[Tensor, "O I"],
    factor: Factor,
) -> Float[Tensor, "O I"]:
    """Solves min over V, zero where pruned, of E‖x_d Wᵀ − x_e Vᵀ‖² + λ‖V − V₀‖².

    Without the mask the solution is (W·C + λV₀)(G + λ)⁻¹; with it, what comes nearest to that under G + λ.

    Args:
        weight: V₀, as it is now.
        goal: W of the dense model, whose inputs may be more.
        cross: C = Σ x_d x_eᵀ.
        pruned: True where a weight must be zero.
        factor: G = Σ x_e x_eᵀ with its damping λ, factorised.
    """
    kind = factor.hessian.dtype
    mean = float(factor.hessian.diagonal().mean()) / (1 + factor.damping)
    free = (goal.to(kind) @ cross.to(kind) + factor.damping * mean * weight.to(kind)) @ factor.inverse
    return reconstruct(free, factor.hessian, pruned, factor=factor).weight.to(weight.dtype)


def distance(
    weight: Float[Tensor, "O I"], goal: Float[Tensor, "O J"], second: Float[Tensor, "I I"], cross: Float[Tensor, "J I"]
) -> float:
    """Σ‖x_d Wᵀ − x_e Vᵀ‖² up to what V does not change: tr(V G Vᵀ) − 2 tr(W C Vᵀ)."""
    new = weight.double()
    return float(((new @ second.double() - 2 * (goal.double() @ cross.double())) * new).sum())


@method("refit", title="Closed-form refit", paper="masked least squares", kind="recover", settings=Settings)
def apply(model: Model, tokens: Tensor, *, walk: Walk | None = None, dense: Model | None = None, **settings: object) -> Records:
    """Refits the layers of a model that lost something.

    Args:
        model: The edited model; one in memory is refitted in place.
        tokens: Calibration token ids, [S, T].
        walk: How to walk; its ``parent`` is the dense model, if nothing else says which.
        dense: The dense model, in memory.
        **settings: See ``Settings``.

    Returns:
        One record per layer that was looked at.

    Raises:
        Problem: If there is no dense model, it does not fit, nothing was lost, or values are not finite.
    """
    chosen, walk = Settings.model_validate(settings), walk or Walk()
    blocks = BlockModel.of(model)
    set_aside(len(tokens), chosen.held_out, "held_out")
    parent, masks = _parent(blocks, chosen, walk, dense), Masks(blocks)
    names = _lossy(blocks, parent, chosen, masks)
    edit = partial(_prepare, settings=chosen, masks=masks, left=_inputs_left(blocks, parent, names))
    return walk_blocks(
        blocks, tokens, edit, names, walk=walk,
        held_out_every=round(1 / chosen.held_out), dense_target=True, parent=parent,
    )  # fmt: skip


def _parent(model: BlockModel, settings: Settings, walk: Walk, given: Model | None) -> BlockModel:
    """The dense model.

    Raises:
        Problem: If there is none, or it has other blocks.
    """
    dense = find_parent(model, settings.parent, walk, given)
    if dense is None:
        raise Problem(
            "There is no dense model to refit to.",
            why="this recipe begins with the model that is to be refitted.",
            fix="`parent: MODEL`, or the step that prunes in the same recipe.",
        )
    shapes = [
        f"{len(each.blocks)} blocks of {each.family.name}, width {each.config.hidden_size}, {each.config.vocab_size:,} tokens"
        for each in (dense, model)
    ]
    if shapes[0] != shapes[1]:
        raise Problem(
            f"The dense model has {shapes[0]}; this one {shapes[1]}.",
            why="every layer is fitted to its own in the dense model, on the same tokens.",
            fix="a `parent` with the same blocks; where blocks were dropped a refit cannot say which is which.",
            code=Exit.INCOMPATIBLE,
        )  # fmt: skip
    return dense


def _lossy(model: BlockModel, dense: BlockModel, settings: Settings, masks: Masks) -> list[str]:
    """The layers with as many outputs as in the dense model that have zeros or fewer inputs; all of them with ``everything``.

    Raises:
        Problem: If there are none.
    """
    names = filter_layers(model.layer_names(), settings.only, settings.skip)
    known = dense.layer_names()
    whole = [name for name in names if name in known and model.shape(name)[0] == dense.shape(name)[0]]
    found = whole if settings.everything else _changed(model, dense, whole, masks)
    if not found:
        raise Problem(
            "No layer of this model lost anything.",
            why=f"none of {len(names)} layers has a mask, at least {SPARSE_FROM:.0%} zeros, or fewer inputs than in the dense model.",
            fix="a pruned model, or `everything: true`.",
        )
    return found


def _changed(model: BlockModel, dense: BlockModel, names: list[str], masks: Masks) -> list[str]:
    """Those of some layers that have fewer inputs than in the dense model, or weights that must stay zero."""
    found = [name for name in names if model.shape(name) != dense.shape(name)]
    for index in range(len(model.blocks)):
        with model.opened(index) as block:
            here = [layer for layer in block.layers.values() if layer.name in names and layer.name not in found]
            found += [layer.name for layer in here if masks.removed(layer.name, layer.read()).any()]
    return found


def _inputs_left(model: BlockModel, dense: BlockModel, names: list[str]) -> dict[str, Tensor]:
    """Which of the dense layer's inputs each layer still has; by the plan beside the model where it has fewer, if there is one for this dense model."""
    gone: dict[str, set[int]] = {}
    file = None if model.checkpoint is None else model.checkpoint.folder / PLAN
    if file is not None and file.is_file() and (plan := Plan.load(file)).base == digest(dense):
        for units in find_units(dense, list(plan.kept)):
            gone.setdefault(units.reader, set()).update(units.columns(units.others(plan.places(units))).tolist())
    found = {}
    for name in names:
        left = [column for column in range(dense.shape(name)[1]) if column not in gone.get(name, ())]
        if len(left) == model.shape(name)[1]:
            found[name] = torch.tensor(left, device=model.device)
    return found


@dataclass(frozen=True)
class _Sums:
    """G = Σ x_e x_eᵀ and C = Σ x_d x_eᵀ, about fixed means where biases make up for them."""

    second: Float[Tensor, "I I"]
    cross: Float[Tensor, "J I"]

    def blended(self, alpha: float, left: Tensor | None) -> _Sums:
        """With (1 − α)·G + α·C for the rows of C whose inputs are left, [I]; with C as it is where these are not known."""
        if left is None:
            return self
        return _Sums(self.second, self.cross.index_copy(0, left, self.second.lerp(self.cross[left], alpha)))

    def without(self, part: _Sums) -> _Sums:
        """Over the tokens that are not in ``part``."""
        return _Sums(self.second - part.second, self.cross - part.cross)


@dataclass(frozen=True)
class _Stage:
    """What the layers of a stage share.

    Sums over all tokens, those fitted to and those held out; the factorised Grams of the former two, the second first; the mean inputs that
    biases make up for, of this model and of what it is fitted to.
    """

    total: _Sums
    train: _Sums
    held_out: _Sums
    trial: Factor
    factor: Factor
    means: tuple[Tensor, Tensor] | None
    statistics: Statistics
    masks: Masks

    def refitted(self, layer: Layer) -> Tensor | None:
        """The layer's new weights, or None where those of the other sequences would leave the held-out ones further off."""
        weight, goal, pruned = _some(layer, self.masks)
        trial = refit(weight, goal, self.train.cross, pruned, self.trial)
        before, after = (distance(each, goal, self.held_out.second, self.held_out.cross) for each in (weight, trial))
        if not after < before:
            return None
        assert layer.parent is not None
        pruned = self.masks.removed(layer.name, layer.read())
        return refit(layer.read(), layer.parent.read(), self.total.cross, pruned, self.factor)


def _prepare(
    layers: list[Layer], statistics: Statistics, *, settings: Settings, masks: Masks, left: Mapping[str, Tensor]
) -> Callable[[Layer], dict[str, Any]]:
    """Chooses the damping that the layers of a stage share, on their held-out sequences."""
    with_bias = all(layer.bias is not None and layer.parent is not None and layer.parent.bias is not None for layer in layers)
    alpha, here = settings.dense_target, left.get(layers[0].name)
    total, held_out = (each.blended(alpha, here) for each in _sums(statistics, with_bias))
    train, kind = total.without(held_out), compute_dtype(layers[0].read())
    grid = settings.damping_grid if settings.damping == "held-out" else (settings.damping,)
    trials = [_some(layer, masks, len(layers)) for layer in layers]
    best: tuple[float, float, Factor] | None = None
    for damping in grid:
        factor = factorise(train.second, damping, dtype=kind)
        error = sum(
            distance(refit(weight, goal, train.cross, pruned, factor), goal, held_out.second, held_out.cross)
            for weight, goal, pruned in (trials if len(grid) > 1 else ())
        )
        if best is None or error < best[0]:
            best = error, damping, factor
    assert best is not None
    _, damping, trial = best
    factor = factorise(total.second, damping, dtype=kind)
    stage = _Stage(
        total, train, held_out, trial, factor, _means(statistics, alpha, here) if with_bias else None, statistics, masks
    )
    return partial(_refit_layer, stage=stage)


def _some(layer: Layer, masks: Masks, together: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """About ``TRIAL_ROWS`` rows of so many layers together: of this one its weights, the dense model's, and which must stay zero."""
    assert layer.parent is not None
    weight, goal = layer.read(), layer.parent.read()
    some = slice(None, None, max(1, together * len(weight) // TRIAL_ROWS))
    return weight[some], goal[some], masks.removed(layer.name, weight)[some]


def _sums(statistics: Statistics, with_bias: bool) -> tuple[_Sums, _Sums]:
    """Over all tokens, and over those held out."""
    total, held_out, dense = statistics.total, statistics.held_out, statistics.dense
    cross, held_out_cross = statistics.cross, statistics.held_out_cross
    assert held_out is not None
    assert dense is not None
    assert cross is not None
    assert held_out_cross is not None
    if not with_bias:
        return _Sums(total.second, cross), _Sums(held_out.second, held_out_cross.second)
    mine, theirs = total.mean, dense.mean
    apart = held_out_cross.second - torch.outer(held_out_cross.first, mine)
    apart -= torch.outer(theirs, held_out.first - held_out.count * mine)
    return _Sums(total.about(mine), cross - torch.outer(dense.first, mine)), _Sums(held_out.about(mine), apart)


def _refit_layer(layer: Layer, *, stage: _Stage) -> dict[str, Any]:
    """Refits one layer, and says how far its outputs are from the dense model's before and after."""
    start, weight = time.perf_counter(), layer.read()
    found = stage.refitted(layer)
    new = weight if found is None else found
    assert layer.parent is not None
    assert stage.statistics.dense is not None
    goal, dense = layer.parent.read(), stage.statistics.dense
    spread = dense.about(dense.mean) if stage.means else dense.second
    whole = max(float(((goal.double() @ spread.double()) * goal.double()).sum()), 1e-30)
    before, after = (
        max(1 + distance(each, goal, stage.total.second, stage.total.cross) / whole, 0.0)  # rounding takes it below
        for each in (weight, new)
    )
    if found is not None:
        layer.write(new, bias=_bias(layer, new, *stage.means) if stage.means else None)
    pruned = stage.masks.removed(layer.name, weight)
    return {
        "removed": int(pruned.sum()), "size": weight.numel(), "moved": found is not None, "damping": stage.factor.damping,
        "relative_error": after, "error_before": before, "seconds": time.perf_counter() - start,
    }  # fmt: skip


def _means(statistics: Statistics, alpha: float, left: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean inputs of this model's layer, [I], and of what it is fitted to, [J]."""
    assert statistics.dense is not None
    mine, theirs = statistics.total.mean, statistics.dense.mean
    return mine, theirs if left is None else theirs.index_copy(0, left, mine.lerp(theirs[left], alpha))


def _bias(layer: Layer, weight: Tensor, mine: Tensor, theirs: Tensor) -> Tensor:
    """The bias b + W·mean(x_d) − V·mean(x_e), with W and b of the dense model; [O]."""
    assert layer.parent is not None
    assert layer.parent.bias is not None
    wanted = layer.parent.bias.to(mine) + layer.parent.read().to(mine) @ theirs
    return wanted - weight.to(mine) @ mine
