"""Smoothing: what makes some channels of a layer's inputs tower above the others moves into its weights; what the model says stays the same.

"SmoothQuant" (Xiao et al., arXiv 2211.10438, Eq. 4). Channel j of the inputs x is divided by s_j = max|x_j|^a / max|W_:j|^(1−a), over all layers that read x, and column j of their
weights multiplied by it. The division costs nothing where something linear writes x: the gain of a norm before q, k, v or before gate and up; the rows of up before down; the rows of v before o,
where the query heads of a group share s. Zeros of weights stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from duramen.calibrate.activations import Activations, Budget
from duramen.calibrate.passes import Passes
from duramen.calibrate.walker import SCRATCH, Records, Walk
from duramen.families.model import BlockModel, Call, Layer, Model, OpenBlock, run_block
from duramen.families.norms import from_zero
from duramen.families.select import filter_layers
from duramen.quantize.folding import cannot, check_outputs, keep_block, norms_read
from duramen.registry import Settings as MethodSettings
from duramen.registry import method


class Settings(MethodSettings):
    """Settings of smoothing."""

    strength: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The exponent a: 0 makes all columns of the weights equally large, 1 all channels of the inputs."""
    only: tuple[str, ...] = ()
    """Layers whose inputs are smoothed, by role (`down`), block range (`blocks:4-27`) or glob (`*.mlp.*`); empty means all. What a norm writes is smoothed if all that read it are among them."""
    skip: tuple[str, ...] = ()
    """Layers to leave alone, in the same words."""

    @property
    def undoes(self) -> tuple[str, ...]:
        """See ``duramen.order``."""
        return ("codes", "rounding", "reduction")


def smoothing_scales(
    largest: Float[Tensor, "I"], weights: Iterable[Float[Tensor, "O I"]], strength: float
) -> Float[Tensor, "I"]:
    """The scale s of every channel, in float64; 1 where a channel is never used.

    Args:
        largest: max|x_j| of every channel.
        weights: Of all layers that read it.
        strength: The exponent a.
    """
    columns = torch.stack([weight.double().abs().amax(0) for weight in weights]).amax(0)
    found = largest.double() ** strength / columns ** (1 - strength)
    return torch.where((largest > 0) & (columns > 0), found, torch.ones_like(found))


@dataclass
class _Place:
    """Where inputs can be smoothed: the layers that read them, and the norm or the layer that writes them, with how many channels it takes turns at."""

    readers: list[str]
    writer: str
    shared: int = 1


@method("smooth", title="Smoothing", paper="arXiv 2211.10438", kind="quantize", settings=Settings)
@torch.no_grad()
def apply(model: Model, tokens: Tensor, *, walk: Walk | None = None, **settings: object) -> Records:
    """Smooths the inputs of a model's layers; its weights become others, its logits do not.

    Args:
        model: The model; one in memory is changed in place.
        tokens: Calibration token ids, [S, T].
        walk: How to walk.
        **settings: See ``Settings``.

    Returns:
        Nothing: no layer loses anything.

    Raises:
        Problem: On filters that match nothing, or a block whose outputs change; a model in memory is then in part another one.
    """
    chosen, walk = Settings.model_validate(settings), walk or Walk()
    blocks = BlockModel.of(model)
    names = set(filter_layers(blocks.layer_names(), chosen.only, chosen.skip))
    batches = torch.split(tokens, walk.batch_size)
    calls: list[list[Call]] = []
    records: Records = []

    def before_the_first_block() -> Iterator[Tensor]:
        for batch in batches:
            hidden, found = blocks.capture(batch)
            calls.append(found)
            yield hidden

    with TemporaryDirectory(dir=walk.scratch, prefix=SCRATCH) as scratch:
        hidden = Activations(before_the_first_block(), Budget(walk.activation_memory), Path(scratch))
        for index in range(len(blocks.blocks)):
            kept = walk.store.load(index) if walk.store else None
            with blocks.opened(index, edited=kept[0] if kept else None) as block:
                passes = Passes(block.module, [each[index] for each in calls], hidden)
                if kept is None:
                    found = _smooth_block(blocks, block, passes, names, chosen.strength)
                    keep_block(walk, block, found)
                records += kept[1] if kept else found
                passes.advance(f"{blocks.family.blocks}.{index}")
        walk.final_hidden, walk.first_batch = hidden[0], batches[0]
    if not records:
        raise cannot(blocks, "smoothed", "nothing linear writes the inputs of these layers, and no norm of theirs alone does")
    before, after = (sum(record[when] for record in records) / len(records) for when in ("before", "after"))
    walk.said = f"The largest channel of an input was {before:.1f} times the median one before, and is {after:.1f} times now, in the mean over {len(records)} layers; no output changed but for rounding."
    return []


def _smooth_block(model: BlockModel, block: OpenBlock, passes: Passes, names: set[str], strength: float) -> Records:
    """Smooths an open block; one record for every layer whose inputs are others now, with the largest of their channels over the median one."""
    layers = block.layers
    with norms_read(block, layers) as norms:
        expected = run_block(block.module, passes.hidden[0], passes.calls[0])
    largest = _largest_inputs(passes, layers)
    columns: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    records: Records = []
    for place in _places(model, block, norms):
        if not all(path in layers and layers[path].name in names for path in place.readers):
            continue
        inputs = largest[place.readers[0]]
        grouped = inputs.view(-1, place.shared, model.sizes(block.index).head) if place.shared > 1 else inputs[:, None, None]
        weights = [layers[path].read().abs().amax(0).view_as(grouped).amax(1).flatten()[None] for path in place.readers]
        scales = smoothing_scales(grouped.amax(1).flatten(), weights, strength)
        spread = scales.view(len(grouped), 1, -1).expand_as(grouped).flatten()
        columns |= dict.fromkeys(place.readers, spread)
        if place.writer in layers:
            rows[place.writer] = scales
        else:
            _divide_norm(model, block, place.writer, scales)
        peaks = {"before": _peak(inputs), "after": _peak(inputs / spread)}
        records += [{"layer": layers[path].name} | peaks for path in place.readers]
    for path in columns.keys() | rows.keys():
        layer = layers[path]
        weight, bias = layer.read().double(), None if layer.bias is None else layer.bias.double()
        weight = weight * columns[path] if path in columns else weight
        if path in rows:
            weight, bias = weight / rows[path][:, None], None if bias is None else bias / rows[path]
        layer.write(weight, bias=bias)
    check_outputs(model, block.index, run_block(block.module, passes.hidden[0], passes.calls[0]), expected, "smoothed")
    return records


def _places(model: BlockModel, block: OpenBlock, norms: dict[str, str]) -> Iterator[_Place]:
    """Where the inputs of a block's layers can be smoothed."""
    for norm in sorted(set(norms.values())):
        yield _Place([path for path, read in norms.items() if read == norm], norm)
    for module in sorted({path.rpartition(".")[0] for path in block.layers}):
        inside = {layer.projection.role: path for path, layer in block.layers.items() if path.rpartition(".")[0] == module}
        if {"gate", "up", "down"} <= inside.keys():
            yield _Place([inside["down"]], inside["up"])
        if {"v", "o"} <= inside.keys():
            sizes = model.sizes(block.index)
            yield _Place([inside["o"]], inside["v"], sizes.heads // sizes.groups)


def _largest_inputs(passes: Passes, layers: dict[str, Layer]) -> dict[str, Float[Tensor, "I"]]:
    """max|x_j| of every channel that layers read, by their paths, over all batches."""
    found: dict[str, Tensor] = {}

    def look(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def seen(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            most = args[0].flatten(0, -2).abs().amax(0).double()
            found[path] = torch.maximum(found[path], most) if path in found else most

        return seen

    handles = [layer.linear.register_forward_pre_hook(look(path)) for path, layer in layers.items()]
    try:
        for batch, call in enumerate(passes.calls):
            run_block(passes.module, passes.hidden[batch], call)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _divide_norm(model: BlockModel, block: OpenBlock, path: str, scales: Float[Tensor, "D"]) -> None:
    """Makes a norm inside a block write its channels divided."""
    norm = block.module.get_submodule(path)
    known = f"{model.family.blocks}.{block.index}.{path}"
    for kind, counted in (("weight", from_zero(norm)), ("bias", 0.0)):
        stored = block.tensors.get(f"{known}.{kind}")
        if stored is not None:
            block.tensors[f"{known}.{kind}"] = ((stored.double() + counted) / scales - counted).to(stored.dtype)
            norm.get_parameter(kind).data.copy_(block.tensors[f"{known}.{kind}"])


def _peak(channels: Float[Tensor, "I"]) -> float:
    return float(channels.max() / channels.median().clamp_min(1e-30))
