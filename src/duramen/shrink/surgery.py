"""Carries a plan out: what stays of every tensor, and the config that goes with it.

Removing a unit equals zeroing the columns that read it, in every family with coupled groups (method sheet, 2.2); ``masked`` is
that other side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from duramen.families import OWN, register_own
from duramen.families.model import BlockModel
from duramen.families.modeling_duramen import STOCK, classes
from duramen.families.table import Family
from duramen.problem import Problem
from duramen.rundir import pack_mask, unpack_mask
from duramen.shrink.groups import Units, find_units
from duramen.shrink.plan import PLAN, Kept, Plan

OLDEST_TRANSFORMERS = "5.15.0"
"""The first version that reads ``per_layer_config``."""
REMOTE = f"transformers {OLDEST_TRANSFORMERS} or later with trust_remote_code"
"""What opens a model whose blocks differ."""
MODELING = Path(__file__).parents[1] / "families" / "modeling_duramen.py"


class Surgery:
    """A plan for a model, ready to be carried out block by block.

    Attributes:
        model: The model as it is; nothing of it is changed.
        plan: What stays.
        units: For every block, the units of the kinds that the plan touches.
    """

    def __init__(self, model: BlockModel, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.units: list[list[Units]] = [[] for _ in model.blocks]
        for each in find_units(model, tuple(plan.kept)):
            self.units[each.block].append(each)

    @property
    def base_type(self) -> str:
        """The stock model type."""
        return str(self.model.config.model_type).removeprefix(OWN)

    @property
    def blocks(self) -> list[int]:
        """The blocks that stay, in order."""
        return [index for index in range(len(self.model.blocks)) if index not in self.plan.dropped]

    @property
    def files(self) -> dict[str, str]:
        """What lies beside the weights: the plan, and the modelling file where the config needs it."""
        before = self.model.checkpoint and self.model.checkpoint.folder / PLAN
        plan = Plan.load(before).then(self.plan) if before and before.is_file() else self.plan
        needs = "auto_map" in self.config
        return {PLAN: plan.to_json()} | ({MODELING.name: MODELING.read_text(encoding="utf-8")} if needs else {})

    def block(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What stays of one block's tensors, which are given by their paths inside the block."""
        gone = self._gone(index)
        return {path: self._cut(index, path, tensor) for path, tensor in tensors.items() if path.split(".")[0] not in gone}

    def stored_name(self, name: str) -> str:
        """The model's own name where the checkpoint has another, which transformers only knows to translate for the stock type."""
        if "auto_map" in self.config:
            for own, stored in self.model.family.stored_as:
                if name.startswith(stored):
                    return own + name.removeprefix(stored)
        return name

    def masks(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What stays of bit-packed masks of layers, where anything of them is left."""
        found = {}
        for name, packed in masks.items():
            block, _, path = name.removeprefix(f"{self.model.family.blocks}.").partition(".")
            weight = self.model.network.get_parameter(f"{name}.weight")
            turned = self.model.transposed(name)
            mask = unpack_mask(packed, weight.shape[0] if turned else weight.shape[1])
            kept = self.block(int(block), {f"{path}.weight": mask.T if turned else mask}) if int(block) in self.blocks else {}
            for cut in kept.values():
                if cut.any():
                    new = f"{self.model.family.blocks}.{self.blocks.index(int(block))}.{path}"
                    found[new] = pack_mask(cut.T if turned else cut)
        return found

    def _gone(self, index: int) -> set[str]:
        """The children of a block that its skipped parts consist of."""
        return {child for part in self.plan.skipped.get(index, ()) for child in part_children(self.base_type, part)}

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What changed: parameters and multiply-adds per token before and after, units that stay, and what opens the result."""
        outside = {
            name: p for name, p in self.model.network.named_parameters() if not name.startswith(f"{self.model.family.blocks}.")
        }
        before = [_shapes(block) for block in self.model.blocks]
        after = [self._shapes(index) for index in self.blocks]
        around = sum(parameter.numel() for parameter in outside.values())
        head = self.model.network.get_output_embeddings()  # type: ignore[operator]
        read = 0 if head is None else head.weight.numel()
        kinds = {
            units.kind: {"units": units.count, "members": units.describe()["members"], "kept": [], "places": []}
            for here in self.units for units in here
        }  # fmt: skip
        for index in self.blocks:
            here = {units.kind: units for units in self.units[index]}
            for kind, found in kinds.items():  # none where the part has left
                found["kept"].append(len(self.plan.stay(here[kind])) if kind in here else 0)
                found["places"].append(len(self.plan.places(here[kind])) if kind in here else 0)
        own = "auto_map" in self.config
        return {
            "parameters": {"before": around + _parameters(before), "after": around + _parameters(after)},
            "macs_per_token": {"before": read + _parameters(before, 2), "after": read + _parameters(after, 2)},
            "blocks": self.blocks,
            "kinds": kinds,
            "skipped": {str(index): list(parts) for index, parts in self.plan.skipped.items()},
            "dropped": list(self.plan.dropped),
            "made_by": dict(self.plan.made_by),
            "opens_in": REMOTE if own else "plain transformers",
        }

    def _cut(self, index: int, path: str, tensor: Tensor) -> Tensor:
        for axis in range(tensor.ndim):
            kept = torch.ones(tensor.shape[axis], dtype=torch.bool)
            for units in self.units[index]:
                places = self.plan.places(units)
                zeros, gone = set(places) - set(self.plan.stay(units)), units.others(places)
                for member in units.members:
                    if (member.path, member.axis) == (path, axis):
                        kept[member.indices(units.sizes, gone)] = False
                        filled = member.indices(units.sizes, sorted(zeros)).to(tensor.device)
                        tensor = tensor.index_fill(axis, filled, 0)
            if not kept.all():
                tensor = tensor.index_select(axis, kept.nonzero().flatten().to(tensor.device))
        return tensor.contiguous()

    def _places(self, units: Units) -> list[int]:
        """The units that a config speaks of: those that have a place, or all of a part that has left, of which nothing is built."""
        left = units.part in self.plan.skipped.get(units.block, ())
        return self.plan.places(units) or (list(range(units.count)) if left else [])

    def widths(self, index: int) -> dict[str, Any]:
        """The config entries of one block that the plan decides."""
        keys = {group.kind: group.config_key for group in self.model.family.groups}
        here, sizes = {units.kind: units for units in self.units[index]}, self.model.sizes(index)
        entries: dict[str, Any] = {}
        if "ffn_channel" in here:
            entries[keys["ffn_channel"]] = len(self._places(here["ffn_channel"]))
        groups, heads = sizes.groups, sizes.heads
        if "query_head" in here:
            heads = len(self.plan.places(here["query_head"]))
        if "kv_group" in here:
            places = self._places(here["kv_group"])
            heads, groups = heads // groups * len(places), len(places)
            entries[keys["kv_group"]] = groups
            if self.model.family.slopes_key:
                slopes = getattr(self.model.config.per_layer_config[index], self.model.family.slopes_key, range(sizes.heads))
                entries[self.model.family.slopes_key] = [slopes[head] for head in places]
        if heads != sizes.heads and "query_head" in keys:
            entries[keys["query_head"]] = heads
        return entries

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config of what stays: the stock one where its class builds these shapes, else that of ``modeling_duramen.py``."""
        checkpoint = self.model.checkpoint
        source: dict[str, Any] = checkpoint.config if checkpoint else self.model.config.to_dict()
        whole: dict[str, Any] = {key: value for key, value in source.items() if key not in ("per_layer_config", "auto_map")}
        whole |= self._fewer_blocks() | self._head_width()
        before = {int(index): entry for index, entry in (source.get("per_layer_config") or {}).items()}
        layers = [before.get(index, {}) | self.widths(index) | self._skips(index, before) for index in self.blocks]
        same = all(entry == layers[0] and "skip" not in entry for entry in layers)
        stock = whole | {"model_type": self.base_type, "architectures": [classes(self.base_type)[1].__mro__[1].__name__]}
        stock = {key: value for key, value in {**stock, **layers[0]}.items() if key in source or key in self._stock_keys}
        if same and self._builds(stock):
            return stock
        own = [made.__name__ for made in classes(self.base_type)]
        return whole | {
            "model_type": f"{OWN}{self.base_type}",
            "architectures": [own[1]],
            "auto_map": {"AutoConfig": f"{MODELING.stem}.{own[0]}", "AutoModelForCausalLM": f"{MODELING.stem}.{own[1]}"},
            "oldest_transformers": OLDEST_TRANSFORMERS,
            "per_layer_config": {str(number): entry for number, entry in enumerate(layers)},
        }  # fmt: skip

    @cached_property
    def _stock_keys(self) -> set[str]:
        """What the stock config has entries for."""
        return set(classes(self.base_type)[0].__mro__[1]().to_dict())

    def _skips(self, index: int, before: Mapping[int, dict[str, Any]]) -> dict[str, list[str]]:
        parts = sorted({*self.plan.skipped.get(index, ()), *before.get(index, {}).get("skip", ())})
        return {"skip": parts} if parts else {}

    def _fewer_blocks(self) -> dict[str, Any]:
        """The number of blocks, and every list of the config that has an entry per block."""
        if not self.plan.dropped:
            return {}
        count, found = len(self.model.blocks), self.model.config.to_dict()
        key = getattr(self.model.config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
        lists = {
            name: [value[index] for index in self.blocks]
            for name, value in found.items()
            if isinstance(value, list) and len(value) == count
        }
        return {key: len(self.blocks)} | lists

    def _head_width(self) -> dict[str, int]:
        """The head's width, said outright, where it no longer follows from the number of heads."""
        touched = {"kv_group", "query_head"} & set(self.plan.kept)
        return {"head_dim": self.model.sizes(0).head} if touched else {}

    def _builds(self, config: dict[str, Any]) -> bool:
        """Whether the stock class accepts this config and has the shapes of what stays."""
        from huggingface_hub.errors import StrictDataclassError

        try:
            network = _without_data(config)
        except (ValueError, StrictDataclassError):
            return False
        built = network.get_submodule(self.model.family.blocks)
        return all(self._shapes(old) == _shapes(built[new]) for new, old in enumerate(self.blocks))

    def _shapes(self, index: int) -> dict[str, torch.Size]:
        state = self.model.blocks[index].state_dict()
        return {path: cut.shape for path, cut in self.block(index, {p: t.to("meta") for p, t in state.items()}).items()}


def left(surgery: Surgery) -> BlockModel:
    """The model that a surgery leaves, without data: its shapes, for what is foretold of later steps."""
    register_own(surgery.config["model_type"])
    return BlockModel.from_module(_without_data(surgery.config))


def _without_data(config: dict[str, Any]) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        network: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    return network


def part_children(model_type: str, part: str) -> tuple[str, ...]:
    """The children of a block that its attention or its MLP consists of."""
    stock = STOCK[model_type]
    return (stock.attention,) if part == "attention" else stock.mlp


def _parameters(blocks: list[dict[str, torch.Size]], axes: int = 0) -> int:
    """Entries of all tensors, or of those with so many axes."""
    return sum(shape.numel() for block in blocks for shape in block.values() if not axes or len(shape) == axes)


def _shapes(block: nn.Module) -> dict[str, torch.Size]:
    return {path: tensor.shape for path, tensor in block.state_dict().items()}


def shrunk(model: BlockModel, plan: Plan) -> nn.Module:
    """A model in memory, cut to what stays, as a new transformers model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    surgery = Surgery(model, plan)
    config = dict(surgery.config)
    register_own(config["model_type"])
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=model.dtype).eval()
    inside = f"{model.family.blocks}."
    state = {name: tensor for name, tensor in model.network.state_dict().items() if not name.startswith(inside)}
    for new, old in enumerate(surgery.blocks):
        kept = surgery.block(old, model.blocks[old].state_dict())
        state |= {f"{inside}{new}.{path}": tensor for path, tensor in kept.items()}
    network.load_state_dict(state)
    assert isinstance(network, nn.Module)
    return network


@contextmanager
def masked(model: BlockModel, plan: Plan) -> Iterator[None]:
    """The same model with everything zeroed that the plan removes; its tensors stay as they are."""
    surgery = Surgery(model, plan)
    with ExitStack() as hooks:
        for index, block in enumerate(model.blocks):
            if index in plan.dropped:
                hooks.callback(block.register_forward_hook(_only_of(block, _pass_through)).remove)
            for units in surgery.units[index]:
                hooks.enter_context(zeroed(model, units, plan.stay(units)))
            for part in plan.skipped.get(index, ()):
                hooks.enter_context(silenced(block, model.family, part))
        yield


@contextmanager
def zeroed(model: BlockModel, units: Units, stay: Sequence[int]) -> Iterator[None]:
    """The same model with all of these units zeroed but those that stay."""
    reader = model.network.get_submodule(units.reader)
    handle = reader.register_forward_pre_hook(_only_of(reader, partial(_zero_inputs, units.columns(stay))))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def silenced(block: nn.Module, family: Family, part: str) -> Iterator[None]:
    """The same block without its attention or its MLP."""
    writer = block.get_submodule(family.writer(part))
    handle = writer.register_forward_hook(_only_of(writer, _zero_output))
    try:
        yield
    finally:
        handle.remove()


def _only_of(module: nn.Module, hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that does nothing to copies of the module: the dense model that others are held against is one."""
    return lambda other, *rest: hook(other, *rest) if other is module else None


def _pass_through(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]


def _zero_inputs(kept: Tensor, reader: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    mask = torch.zeros(args[0].shape[-1], dtype=args[0].dtype, device=args[0].device)
    mask[kept.to(mask.device)] = 1
    return (args[0] * mask, *args[1:])


def _zero_output(writer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def homogenised(model: BlockModel, plan: Plan) -> Plan:
    """A plan with the same function whose blocks all have one shape that the stock class builds; zeros fill what is too narrow.

    Raises:
        Problem: If a part is skipped whose output has a bias, which zeros cannot stand for, or if no shape will do.
    """
    kept = dict(plan.kept)
    for part, kind in (("attention", "kv_group"), ("mlp", "ffn_channel")):
        blocks = [block for block, parts in plan.skipped.items() if part in parts]
        if not blocks:
            continue
        if model.network.get_submodule(f"{model.family.blocks}.{blocks[0]}.{model.family.writer(part)}").bias is not None:
            raise Problem(
                f"The {part} of block {blocks[0]} cannot be filled with zeros.",
                why="its output has a bias, which stays when all of its units are gone.",
                fix="`homogenise: false`, which leaves the part out altogether.",
            )  # fmt: skip
        whole = {units.block: tuple(range(units.count)) for units in find_units(model, (kind,))}
        here = kept.get(kind, tuple(whole[block] for block in sorted(whole)))
        kept[kind] = tuple(() if block in blocks else units for block, units in enumerate(here))
    widths = {kind: max(map(len, blocks)) for kind, blocks in kept.items()}
    units = find_units(model, tuple(kept))
    most = {kind: max(each.count for each in units if each.kind == kind) for kind in kept}
    while True:
        filled = replace(plan, kept=kept, fill=_fill(kept, widths, units), skipped={})
        if OWN not in Surgery(model, filled).config["model_type"]:
            return filled
        heads = [kind for kind in ("query_head", "kv_group") if kind in kept and widths[kind] < most[kind]]
        if heads:
            widths[heads[0]] += 1
        elif widths.get("ffn_channel", 0) < most.get("ffn_channel", 0):
            widths["ffn_channel"] = most["ffn_channel"]
        else:
            raise Problem(
                "No uniform shape makes this a stock model.",
                why="its blocks differ already, and places that were cut before cannot come back.",
                fix="`homogenise: true` in the first step that cuts, or `homogenise: false`.",
            )


def _fill(kept: Kept, widths: Mapping[str, int], units: list[Units]) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The first removed units of every block, as many as it lacks."""
    fill: dict[str, list[tuple[int, ...]]] = {kind: [() for _ in blocks] for kind, blocks in kept.items()}
    for each in units:
        stay = kept[each.kind][each.block]
        fill[each.kind][each.block] = tuple(each.others(stay)[: widths[each.kind] - len(stay)])
    return {kind: tuple(blocks) for kind, blocks in fill.items()}
