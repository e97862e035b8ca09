"""A language model that is opened one block at a time, from disk or in place.

From disk the network lives on the meta device; opening a block reads its tensors, closing it frees them. So the memory in use
is that of the embeddings and one block, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, nn

from duramen.families import find_family
from duramen.families.checkpoint import Checkpoint, check_finite
from duramen.families.generic import infer_family
from duramen.families.table import Family, Projection, Sizes
from duramen.grids import Quantized
from duramen.problem import Exit, Problem
from duramen.reading import reading
from duramen.rounding import start_rounding
from duramen.rundir import read_formats
from duramen.ssm.mixer import ExactScans

CPU = torch.device("cpu")
LOGITS_AT_ONCE = 512
"""Positions whose logits are held at once."""


@dataclass
class Layer:
    """One linear weight of an open block.

    Attributes:
        name: Full module path.
        projection: Its entry in the family's table.
        block: Index of its block.
        linear: The module that runs.
        stored: Its weight and, if it has one, its bias as stored, not as cast for the forward pass.
        edited: The new ones by full name, in the stored type and layout, once written.
        pruned: What was removed from the weight, bool [O, I], where the edit removed anything.
        quantized: The codes that the weight stands for, where the edit rounded it to a grid.
        parent: The same layer of the dense model, where a step runs that in step.
    """

    name: str
    projection: Projection
    block: int
    linear: nn.Module
    stored: dict[str, Tensor]
    edited: dict[str, Tensor] = field(default_factory=dict)
    pruned: Tensor | None = None
    quantized: Quantized | None = None
    parent: Layer | None = None

    def read(self) -> Tensor:
        """The weight, [O, I], in its stored type."""
        weight = self.stored["weight"]
        return weight.T if self.projection.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, [O], in its stored type; None if the layer has none."""
        return self.stored.get("bias")

    def write(self, weight: Tensor, *, bias: Tensor | None = None, pruned: Tensor | None = None) -> None:
        """Sets the weight, [O, I], its mask, bool [O, I], and its bias, [O]; the block runs with them from here on."""
        self.pruned = pruned
        self._set("weight", weight.T if self.projection.transposed else weight)
        if bias is not None:
            self._set("bias", bias)

    def take_over(self, edited: dict[str, Tensor], pruned: Tensor | None, quantized: Quantized | None) -> None:
        """Sets what another process wrote: its ``edited``, its mask and its codes."""
        self.pruned, self.quantized = pruned, quantized
        for name, tensor in edited.items():
            self._set(name.rpartition(".")[2], tensor)

    def _set(self, kind: str, new: Tensor) -> None:
        self.edited[f"{self.name}.{kind}"] = new.to(self.stored[kind].dtype).contiguous()
        self.linear.get_parameter(kind).data.copy_(self.edited[f"{self.name}.{kind}"])


@dataclass
class OpenBlock:
    """A block in memory: the module that runs, the stored tensors of its own by full name, and its layers by path."""

    index: int
    module: nn.Module
    tensors: dict[str, Tensor]
    layers: dict[str, Layer]


@dataclass
class Call:
    """Everything a block is called with beside the hidden states."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


Model: TypeAlias = "BlockModel | nn.Module"
"""What a method takes: a loaded transformers model, which is edited in place, or a ``BlockModel``."""


class BlockModel:
    """A causal language model, block by block.

    Attributes:
        network: The transformers model; its blocks are on the meta device unless open, or all real if given in place.
        family: What is known of its architecture.
        checkpoint: The folder behind it; None for a model given in place.
        dtype: Type of the forward pass.
        device: Where an open block is, and everything that is computed with it.
    """

    def __init__(
        self, network: nn.Module, family: Family, checkpoint: Checkpoint | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.network, self.family, self.checkpoint, self.dtype, self.device = network, family, checkpoint, dtype, device

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
        allow_generic: bool = False,
    ) -> Self:
        """Opens a Hugging Face folder without reading its blocks.

        Its modules round what the folder's formats say; state-space layers run on our scans where there are no kernels for the device.

        Raises:
            Problem: If the folder is damaged, quantized, or of an unknown architecture without ``allow_generic``.
        """
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        checkpoint = Checkpoint(folder)
        known = None if allow_generic else find_family(str(checkpoint.config.get("model_type", "?")))
        with reading(folder / "config.json"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            if not 0 < config.num_hidden_layers <= len(checkpoint.names):
                raise ValueError(
                    f"it says {config.num_hidden_layers:,} blocks, and there are {len(checkpoint.names):,} tensors"
                )
            with init_empty_weights(include_buffers=False):
                network = AutoModelForCausalLM.from_config(config, dtype=dtype)
        network.eval()
        if device.type == "cpu" or find_spec("mamba_ssm") is None:
            ExactScans(network)
        start_rounding(network, read_formats(folder))
        model = cls(network, known or _family(network, allow_generic), checkpoint, dtype, device)
        model._load_outside()
        return model

    @classmethod
    def from_module(cls, network: nn.Module, *, allow_generic: bool = False) -> BlockModel:
        """Wraps a loaded transformers model; edits happen in place."""
        first = next(network.parameters())
        return cls(network.eval(), _family(network, allow_generic), None, first.dtype, first.device)

    @classmethod
    def of(cls, model: Model) -> BlockModel:
        """A loaded transformers model, wrapped; a ``BlockModel`` stays what it is."""
        return model if isinstance(model, BlockModel) else cls.from_module(model)

    @property
    def config(self) -> Any:
        """The transformers config."""
        return self.network.config

    def sizes(self, block: int) -> Sizes:
        """Widths of one block; those of all blocks agree unless units were removed."""
        return self.family.sizes(self.config.per_layer_config[block])

    @cached_property
    def blocks(self) -> nn.ModuleList:
        """The list of blocks."""
        found = self.network.get_submodule(self.family.blocks)
        assert isinstance(found, nn.ModuleList)
        return found

    def layer_names(self) -> dict[str, tuple[str, int]]:
        """Full name of every linear layer of the table -> (role, block), in running order."""
        return {
            f"{self.family.blocks}.{index}.{projection.path}": (projection.role, index)
            for index in range(len(self.blocks))
            for stage in self.family.stages
            for projection in stage
            if has_module(self.blocks[index], projection.path)
        }

    def transposed(self, name: str) -> bool:
        """Whether the weight of a layer, by its full name, is stored [I, O]."""
        return self._projection(name).transposed

    def left(self, index: int) -> tuple[str, ...]:
        """The parts of a block, ``attention`` or ``mlp``, that an earlier cut let leave."""
        return tuple(getattr(self.config.per_layer_config[index], "skip", None) or ())

    def tapped(self, name: str) -> bool:
        """Whether the block multiplies by the weight of a layer, by its full name, without calling it."""
        return self._projection(name).tap is not None

    def _projection(self, name: str) -> Projection:
        path = name.removeprefix(f"{self.family.blocks}.").partition(".")[2]
        return next(item for stage in self.family.stages for item in stage if item.path == path)

    def shape(self, name: str) -> tuple[int, int]:
        """Outputs and inputs of a linear layer, by its full name."""
        rows, columns = self.network.get_parameter(f"{name}.weight").shape
        return (columns, rows) if self.transposed(name) else (rows, columns)

    def stages(self, index: int) -> list[tuple[Projection, ...]]:
        """The projections of block ``index``, those with the same input together."""
        present = (tuple(item for item in stage if has_module(self.blocks[index], item.path)) for stage in self.family.stages)
        return [stage for stage in present if stage]

    @contextmanager
    def opened(self, index: int, *, edited: dict[str, Tensor] | None = None) -> Iterator[OpenBlock]:
        """Opens block ``index``; ``edited`` tensors (by full name) take the place of the stored ones."""
        block, prefix = self.blocks[index], f"{self.family.blocks}.{index}."
        names = [prefix + name for name in block.state_dict()]
        if self.checkpoint is None:
            tensors = {prefix + name: tensor.detach().clone() for name, tensor in block.state_dict().items()}
        else:
            stored = ((name, edited[name] if edited and name in edited else self._read(name)) for name in names)
            tensors = {name: tensor.to(self.device) for name, tensor in stored}
            self._assign(block, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
            self.checkpoint.prefetch(f"{self.family.blocks.rpartition('.')[2]}.{index + 1}.")
        for name, tensor in tensors.items():
            check_finite(name, tensor)
        own = {name: tensor for name, tensor in tensors.items() if self.checkpoint is None or self._stored_alone(name)}
        try:
            yield OpenBlock(index, block, own, self._layers(index, block, own))
        finally:
            if self.checkpoint is not None:
                empty = {name: parameter.to("meta") for name, parameter in block.named_parameters()}
                block.load_state_dict(empty, strict=False, assign=True)

    def _layers(self, index: int, block: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Layer]:
        layers = {}
        for item in chain(*self.stages(index)):
            name = f"{self.family.blocks}.{index}.{item.path}"
            stored = {kind: tensors[f"{name}.{kind}"] for kind in ("weight", "bias") if f"{name}.{kind}" in tensors}
            layers[item.path] = Layer(name, item, index, block.get_submodule(item.path), stored)
        return layers

    def stored_name(self, name: str) -> str:
        """The checkpoint's own name of a parameter; some checkpoints leave the base model's prefix out."""
        assert self.checkpoint is not None
        short = name.removeprefix(f"{getattr(self.network, 'base_model_prefix', '')}.")
        renamed = [there + name.removeprefix(here) for here, there in self.family.stored_as if name.startswith(here)]
        for candidate in (name, short, *renamed):
            if candidate in self.checkpoint.files:
                return candidate
        raise Problem(
            f"The checkpoint has no tensor {name}.",
            why="the folder is incomplete, or its tensors are named for another version of the architecture.",
            fix="open it in transformers and save it again with `save_pretrained`.",
            code=Exit.INCOMPATIBLE,
        )

    def by_stored_name(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors outside the blocks by the names that they have, or would have, in the checkpoint."""
        assert self.checkpoint is not None
        known = {name: self.stored_name(name) for name in tensors if name not in self._tied}
        return {known.get(name, name): tensor for name, tensor in tensors.items()}

    def stored_outside(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors outside the blocks under the names that they have in the network, as stored; tied ones once."""
        inside = self.family.blocks + "."
        for name, tensor in self.network.state_dict().items():
            if not name.startswith(inside) and name not in self._tied:
                yield name, tensor if self.checkpoint is None else self._read(name)

    def _read(self, name: str) -> Tensor:
        assert self.checkpoint is not None
        name = self._tied.get(name, name)
        for stacked in self.family.stacked:
            if name.endswith("." + stacked.path):
                start, count = name.removesuffix(stacked.path), len(self.network.get_parameter(name))
                experts = [[self._read(start + part.format(expert)) for part in stacked.parts] for expert in range(count)]
                return torch.stack([torch.cat(parts) for parts in experts])
        return self.checkpoint.read(self.stored_name(name))

    def _stored_alone(self, name: str) -> bool:
        """Whether the checkpoint holds this parameter under a name of its own, and whole."""
        return name not in self._tied and not any(name.endswith("." + stacked.path) for stacked in self.family.stacked)

    @cached_property
    def _tied(self) -> dict[str, str]:
        """Parameters that take their values from another one, so that the checkpoint need not hold them -> that one."""
        return dict(getattr(self.network, "all_tied_weights_keys", {}))

    def _load_outside(self) -> None:
        """Reads the parameters outside the blocks."""
        inside = self.family.blocks + "."
        for name, module in self.network.named_modules():
            if not name.startswith(inside):
                own = [key for key, _ in module.named_parameters(recurse=False) if f"{name}.{key}" not in self._tied]
                self._assign(module, {key: self._read(f"{name}.{key}") for key in own})
        self.network.tie_weights()  # type: ignore[operator]
        for module in self.network.modules():
            for key, buffer in module.named_buffers(recurse=False):
                setattr(module, key, buffer.to(self.device))

    def _assign(self, module: nn.Module, state: dict[str, Tensor]) -> None:
        """Gives a module on the meta device these tensors, cast for the forward pass, in memory of its own."""
        cast = {
            name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
            for name, tensor in state.items()
        }
        try:
            module.load_state_dict(cast, strict=False, assign=True)
        except RuntimeError as error:
            raise Problem(
                f"Tensors do not fit their places: {str(error).splitlines()[-1].strip()}", why="`config.json` says other sizes than the weights have.",
                fix="the config and the weights of one model.", code=Exit.INCOMPATIBLE,
            ) from error  # fmt: skip

    def capture(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        """Runs everything before the first block, and records what each block would be called with.

        Args:
            tokens: Token ids, [B, T].

        Returns:
            The hidden states before block 0, [B, T, D], and the call of every block.

        Raises:
            Problem: If the model has learned fewer positions.
        """
        most = self._learned_positions
        if most is not None and tokens.shape[1] > most:
            raise Problem(
                f"Sequences of {tokens.shape[1]} tokens are too long: the model has learned {most} positions.",
                why="each has a vector of its own.", fix=f"`length: {most}`, of the calibration or of what is evaluated.", code=Exit.INCOMPATIBLE,
            )  # fmt: skip
        recorders = [_Recorder(block, self._returned) for block in self.blocks]
        with self._replaced(recorders):
            self.network.base_model(input_ids=tokens.to(self.device), use_cache=False)  # type: ignore[operator]
        return recorders[0].hidden, [recorder.call for recorder in recorders]

    @cached_property
    def _learned_positions(self) -> int | None:
        """Rows of a table of positions, as GPT-2 and OPT have; None without one."""
        for name, module in self.network.named_modules():
            if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in ("wpe", "embed_positions"):
                return module.num_embeddings - int(getattr(module, "offset", 0))
        return None

    def last_hidden(self, batches: Iterable[Tensor], starts: Iterable[Sequence[int]] | None = None) -> list[Tensor]:
        """Runs all blocks: the hidden states after the last one, [B, T, D] for every batch of token ids [B, T].

        Args:
            batches: Token ids.
            starts: Where what is scored begins, for every row of every batch; matters to models that shorten what comes before.
        """
        captured = [self.capture(batch) for batch in batches]
        hidden = [item for item, _ in captured]
        for index in range(len(self.blocks)):
            with self.opened(index) as block:
                for number, (_, calls) in enumerate(captured):
                    hidden[number] = run_block(block.module, hidden[number], calls[index])
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head on the hidden states after the last block, [B, T, D] -> [B, T, V]."""
        with self._replaced([_Replay(block, self._returned, hidden) for block in self.blocks]):
            tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
            return self.network(input_ids=tokens, use_cache=False).logits  # type: ignore[no-any-return]

    def log_probabilities(self, hidden: Tensor) -> Iterator[Tensor]:
        """Of the next tokens, in float32 and so many positions at a time that their logits fit: [1, T, D] -> [n, V] each."""
        for part in torch.split(hidden, LOGITS_AT_ONCE, dim=1):
            yield self.logits(part)[0].float().log_softmax(-1)

    @cached_property
    def _returned(self) -> int:
        """How many values a block returns in a tuple, 0 for a bare tensor; seen by running the first one on a few tokens."""
        seen: list[int] = []

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(len(output) if isinstance(output, tuple) else 0)
            raise _Seen

        with self.opened(0) as first, suppress(_Seen):
            handle = first.module.register_forward_hook(stop)
            try:
                tokens = torch.zeros(1, 4, dtype=torch.long, device=self.device)
                self.network.base_model(input_ids=tokens, use_cache=False)  # type: ignore[operator]
            finally:
                handle.remove()
        return seen[0]

    @contextmanager
    def _replaced(self, stand_ins: Sequence[nn.Module]) -> Iterator[None]:
        """Puts other modules in the place of the blocks for a while."""
        originals = list(self.blocks)
        try:
            for index, module in enumerate(stand_ins):
                self.blocks[index] = module
            yield
        finally:
            for index, block in enumerate(originals):
                self.blocks[index] = block


class _Seen(Exception):
    """Ends a forward pass once it has shown what was asked."""


class _StandIn(nn.Module):
    """Takes a block's place; whatever the model asks of it is asked of the block."""

    def __init__(self, block: nn.Module, returned: int) -> None:
        super().__init__()
        self.__dict__["stand_in_for"] = block
        self.returned = returned

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stand_in_for"], name)

    def hand_on(self, hidden: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        """The hidden states in the form in which the block returns them."""
        return (hidden, *[None] * (self.returned - 1)) if self.returned else hidden


class _Recorder(_StandIn):
    """Notes a block's call and hands the hidden states on unchanged."""

    hidden: Tensor
    call: Call

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        self.hidden, self.call = hidden, Call(args, kwargs)
        return self.hand_on(hidden)


class _Replay(_StandIn):
    """Hands on given hidden states, whatever comes in."""

    def __init__(self, block: nn.Module, returned: int, hidden: Tensor) -> None:
        super().__init__(block, returned)
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        return self.hand_on(self.hidden)


def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Runs one block on recorded arguments, [B, T, D] -> [B, T, D]."""
    output = block(hidden, *call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def _family(network: nn.Module, allow_generic: bool) -> Family:
    model_type = str(getattr(getattr(network, "config", None), "model_type", "?"))
    try:
        return find_family(model_type)
    except Problem:
        if not allow_generic:
            raise
        return infer_family(network)


def has_module(block: nn.Module, path: str) -> bool:
    """Whether there is a module of that path inside a block; in hybrids blocks are of several kinds."""
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True
