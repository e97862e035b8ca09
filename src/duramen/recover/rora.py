"""RoRA: low-rank adapters whose strength does not fade with rank, trained on what compression left, and merged into it.

"RoRA" (Liu et al., arXiv 2501.04315): a change γBA of every weight with γ = α/√r. On a sparse weight the change is masked in every forward
pass, so that merging keeps each zero; the learning rate follows γ and the rank (``scaling``). Where the dense model is at hand its
distributions are half of what is learned. The result is an ordinary model: adapters are merged at the end of the step, and the merge is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from duramen.calibrate import ranks
from duramen.calibrate.statistics import Statistics
from duramen.calibrate.walker import Records, Walk, walk_blocks
from duramen.families.model import BlockModel, Layer, Model
from duramen.families.select import trainable
from duramen.grids import Quantized
from duramen.problem import Problem
from duramen.prune.masks import Masks
from duramen.prune.reconstruct import output_error
from duramen.recover.adapters import Adapter, Start
from duramen.recover.merge import check_outputs, check_zeros
from duramen.recover.peft_io import CONFIG, WEIGHTS, check_alone, write_peft
from duramen.recover.scaling import Rule, coupled_rate, scale
from duramen.registry import method
from duramen.rundir import read_codes
from duramen.train.models import open_course, replaced, summary, teach
from duramen.train.objective import NextTokens
from duramen.train.settings import TrainSettings

RATE = 3e-4
"""Learning rate at the reference strength (``scaling.REFERENCE``): LoRA's published one."""
SPP_RATE, SPP_STRENGTH = 4e-3, 2.0
"""The published learning rate and strength of SPP."""
TOLERANCE = 1e-4
"""Largest difference of a merged layer's outputs, relative to the largest; 2⁻⁵ where a half type runs or is stored."""
WITNESSES = 64
"""Tokens by whose outputs a merge is checked."""


class Settings(TrainSettings):
    """Settings of RoRA."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of the change of every weight, r."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """α of the strength γ."""
    scaling: Rule = "alpha_over_sqrt_r"
    """γ: α/√r (RoRA), α/r (LoRA), or α."""
    mode: Literal["auto", "side", "masked", "spp", "grid"] = "auto"
    """`masked` changes only what a sparse weight has, `spp` multiplies it, `side` changes everything; `grid` also rounds to the steps of a layer that was rounded, so that it stays on its grid; `auto` is grid where there are codes, masked on sparse weights and side on others."""
    dora: bool = False
    """Whether the length of every row is learned apart."""
    init: Start = "zero"
    """How A and B begin: `zero` with B at zero, `pissa` with the strongest directions of the weight, taken off so that the model begins as it is."""
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Of AdamW at its height; `auto` couples it to γ and the rank, 3e-4 at γ·r = 64 (in `spp` to γ alone, 4e-3 at 2)."""
    plus_ratio: Annotated[float, Field(gt=0)] = 1.0
    """How many times the rate of A that of B is."""
    adapter: Literal["", "portable", "rslora"] = ""
    """Whether to keep the adapters too, in the folder `adapter` beside the merged model, in PEFT's format: `portable` with γ folded in, `rslora` as trained; only in `side` without `dora`."""

    @model_validator(mode="after")
    def _check(self) -> Settings:
        if self.mode == "spp" and self.init != "zero":
            raise Problem(
                "`init: pissa` has no meaning in the mode `spp`.",
                why="its factors are no directions of the weight.",
                fix="`init: zero`.",
            )
        return self

    @property
    def gamma(self) -> float:
        """γ."""
        return scale(self.alpha, self.rank, self.scaling)

    @property
    def rate(self) -> float:
        """The learning rate of A."""
        if self.learning_rate != "auto":
            return self.learning_rate
        if self.mode == "spp":  # every output meets one row of A, whatever the rank
            return coupled_rate(SPP_RATE, self.gamma, 1, reference=SPP_STRENGTH)
        return coupled_rate(RATE, self.gamma, self.rank)

    @property
    def undoes(self) -> tuple[str, ...]:
        """See ``duramen.order``."""
        return ("reduction",) if self.mode in ("auto", "grid") else ("codes", "reduction")


@contextmanager
def adapted(network: nn.Module, model: BlockModel, settings: Settings) -> Iterator[dict[str, Adapter]]:
    """A network with an adapter in the place of every chosen layer, and all else frozen, for a while.

    Args:
        network: The transformers model.
        model: The same, block by block: says which layers there are, and which weights stay zero.
        settings: Rank, strength, mode, filters.

    Yields:
        The adapters by the layers' full names.

    Raises:
        Problem: If filters match nothing, or nothing but layers that their blocks never call; if a rank is larger than a weight, or a
            change would fill the zeros of a sparse one.
    """
    names = set(trainable(model, settings.only, settings.skip))
    generator, masks = torch.Generator().manual_seed(settings.seed), Masks(model)
    codes = {} if model.checkpoint is None else read_codes(model.checkpoint.folder)
    adapters: dict[str, Adapter] = {}
    with replaced(network) as put:
        for index in range(len(model.blocks)):
            for name, zeros in _removed(model, index, names, masks).items():
                base, transposed = network.get_submodule(name), model.transposed(name)
                adapters[name] = _adapter(name, base, zeros, codes.get(name), settings, generator, transposed=transposed)
                put(name, adapters[name])
        yield adapters


def _removed(model: BlockModel, index: int, names: set[str], masks: Masks) -> dict[str, Tensor]:
    """Which weights of a block's chosen layers stay zero, as stored."""
    with model.opened(index) as block:
        return {each.name: masks.removed(each.name, each.read()) for each in block.layers.values() if each.name in names}


def check_rank(name: str, shape: tuple[int, ...], rank: int) -> None:
    """Stops at a rank that a layer's shape, (outputs, inputs), does not have.

    Raises:
        Problem: Then.
    """
    if rank > min(shape):
        raise Problem(
            f"{name} has {shape[0]} outputs and {shape[1]} inputs, and the rank is {rank}.",
            why="more directions than the smaller of the two add nothing.",
            fix=f"`rank: {min(shape)}` or less, or `skip` for this layer.",
        )


def _adapter(
    name: str,
    base: nn.Module,
    zeros: Tensor,
    codes: Quantized | None,
    settings: Settings,
    generator: torch.Generator,
    *,
    transposed: bool,
) -> Adapter:
    """The adapter of one layer."""
    sparse = bool(zeros.any())
    mode = ("grid" if codes else "masked" if sparse else "side") if settings.mode == "auto" else settings.mode
    if mode == "grid" and (codes is None or settings.dora):
        raise Problem(
            f"{name} cannot be trained on a grid.",
            why="`dora` gives every row a length of its own, which its steps do not have." if codes else "it has no codes.",
            fix="`dora: false`." if codes else "`mode: auto`, or a step `gptq` before this one.",
        )
    if sparse and mode == "side":
        raise Problem(
            f"The change of {name} would fill its {int(zeros.sum()):,} removed weights.",
            why="in the mode `side` every weight changes.",
            fix="`mode: auto`, `masked` or `spp`, whose merge keeps every zero.",
        )
    check_rank(name, tuple(zeros.shape), settings.rank)
    return Adapter(
        base, rank=settings.rank, gamma=settings.gamma, mode=mode, lengths=settings.dora, transposed=transposed,
        start=settings.init, seed=settings.seed,
        kept=~zeros if sparse or mode == "masked" else None, generator=generator, codes=codes if mode == "grid" else None,
    )  # fmt: skip


@method("rora", title="RoRA", paper="arXiv 2501.04315", kind="recover", settings=Settings)
def apply(model: Model, tokens: Tensor, *, walk: Walk | None = None, dense: Model | None = None, **settings: object) -> Records:
    """Trains adapters on a model and merges them into it.

    Args:
        model: The model; one in memory is changed in place.
        tokens: Token ids to learn, [S, T].
        walk: How to walk; its ``parent`` is the dense model, if nothing else says which.
        dense: The dense model, in memory.
        **settings: See ``Settings``.

    Returns:
        One record per layer that was changed.

    Raises:
        Problem: On filters that match nothing, a teacher that is missing or does not fit, a loss that is not finite, a merge that
            would fill zeros.
    """
    chosen, walk = Settings.model_validate(settings), walk or Walk()
    blocks = BlockModel.of(model)
    course = open_course(blocks, tokens, chosen, walk, dense)
    network = course.network
    with adapted(network, blocks, chosen) as adapters:
        if chosen.adapter:
            check_alone(adapters)
        text = NextTokens(course, chosen.distill_weight, chosen.temperature, chosen.at_once)
        trained = groups(adapters, chosen)
        history = teach(course, text, trained, chosen, blocks, walk)
        if chosen.adapter and walk.folder and ranks.leads():
            base = "" if blocks.checkpoint is None else str(blocks.checkpoint.folder)
            write_peft(walk.folder / "adapter", adapters, alpha=chosen.alpha, form=chosen.adapter, base=base)
            walk.files |= {f"adapter/{name}": walk.folder / "adapter" / name for name in (CONFIG, WEIGHTS)}
        witnesses = _witnesses(network, adapters, tokens[:1].to(blocks.device))
        weights = [adapter.weight for adapter in adapters.values()]
        walk.training = summary(blocks, weights, trained, history, rate=chosen.rate, distilled=course.teacher is not None) | {
            "gamma": chosen.gamma
        }
    del network, course, text
    edit = partial(_edit, adapters=adapters, witnesses=witnesses, untrained=history.best == 0)
    return walk_blocks(blocks, tokens, edit, list(adapters), walk=walk)


def groups(adapters: dict[str, Adapter], settings: Settings) -> list[dict[str, Any]]:
    """What is trained: A and row lengths at one rate, B at ``plus_ratio`` times it."""
    slow = [p for adapter in adapters.values() for p in (adapter.a, adapter.length) if p is not None]
    fast = [adapter.b for adapter in adapters.values()]
    return [{"params": slow, "lr": settings.rate}, {"params": fast, "lr": settings.rate * settings.plus_ratio}]


@torch.no_grad()
def _witnesses(network: nn.Module, adapters: dict[str, Adapter], tokens: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Some inputs of every adapted layer, [N, I], and what it makes of them, [N, O], by name."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] = args[0].flatten(0, -2)[:WITNESSES].clone(), output.flatten(0, -2)[:WITNESSES].clone()

        return look

    handles = [adapter.register_forward_hook(keep(name)) for name, adapter in adapters.items()]
    network(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def _edit(
    layers: list[Layer],
    statistics: Statistics,
    *,
    adapters: dict[str, Adapter],
    witnesses: dict[str, tuple[Tensor, Tensor]],
    untrained: bool,
) -> Callable[[Layer], dict[str, Any]]:
    """Merges the adapters into the weights as stored, and compares the outputs; nothing changes where the start was the best."""

    def write(layer: Layer) -> dict[str, Any]:
        adapter, weight, difference = adapters[layer.name], layer.read(), 0.0
        new = weight if untrained else adapter.merged(weight)
        if isinstance(adapter.kept, Tensor):
            check_zeros(layer.name, new, adapter.kept)
        if not untrained:
            if layer.name in witnesses:
                x, y = witnesses[layer.name]
                half = min(torch.finfo(new.dtype).bits, torch.finfo(x.dtype).bits) < 32
                difference = check_outputs(layer.name, new, layer.bias, x, y, tolerance=2**-5 if half else TOLERANCE)
            layer.write(new)
        layer.quantized = adapter.quantized(weight)
        second = statistics.total.second
        whole = max(output_error(weight, torch.zeros_like(weight), second), 1e-30)
        return {
            "removed": int((~adapter.kept).sum()) if isinstance(adapter.kept, Tensor) else 0, "size": new.numel(),
            "relative_error": output_error(weight, new, second) / whole,
            "mode": adapter.mode, "merge_difference": difference, "seconds": 0.0,
        }  # fmt: skip

    return write
