"""What Duramen knows of an architecture, as data: where the blocks are, each projection's role, and what is coupled.

A *stage* is a set of projections that read the same tensor; stages are listed in the order in which a block runs them.
A *coupled group* says which entries of which axes belong to one unit (a query head, a KV group, an FFN channel, a channel
of the residual stream), so that a unit can be removed from all tensors at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duramen.problem import Exit, Problem


@dataclass(frozen=True)
class Projection:
    """One linear weight of a block.

    Attributes:
        role: q k v o gate up down qkv gate_up, in x dt out (Mamba), or the family's own.
        path: Module path inside the block.
        transposed: Whether the weight is stored [I, O] (GPT-2's Conv1D).
        tap: Where the block multiplies by the weight without calling the module: the module whose output has this
            projection's input in its first columns.
    """

    role: str
    path: str
    transposed: bool = False
    tap: str | None = None


Stages = tuple[tuple[Projection, ...], ...]


@dataclass(frozen=True)
class Sizes:
    """Widths of a model: D residual, F ffn, H query heads, G KV groups, P head."""

    width: int
    ffn: int
    heads: int
    groups: int
    head: int


Extent = Callable[[Sizes], int]


@dataclass(frozen=True)
class Member:
    """The entries of one axis of one tensor that belong to each unit of a group.

    Unit u has the entries from ``offset + u·size`` up to ``offset + (u+1)·size``.

    Attributes:
        path: Parameter path inside the block, or from the model's root if ``outside``.
        axis: Axis of the stored tensor.
        size: Entries per unit.
        offset: First entry of unit 0.
        reads: Whether the tensor reads the unit (else it writes it).
        outside: Whether the tensor lies outside the blocks.
    """

    path: str
    axis: int
    size: Extent
    offset: Extent = lambda s: 0
    reads: bool = False
    outside: bool = False

    def indices(self, sizes: Sizes, units: int | Sequence[int]) -> Tensor:
        """Entries of the axis that belong to these units, one unit after another, [n]."""
        size = self.size(sizes)
        chosen = torch.tensor([units] if isinstance(units, int) else list(units), dtype=torch.long)
        return (self.offset(sizes) + size * chosen[:, None] + torch.arange(size)).flatten()


@dataclass(frozen=True)
class Group:
    """A coupled group.

    Attributes:
        kind: kv_group (a key and value head with its query heads), query_head (where several share a KV group), ffn_channel or width.
        count: Number of units.
        config_key: Config attribute that holds this number.
        members: Every tensor axis that carries the unit. Paths that a config leaves out (biases) may be absent.
    """

    kind: str
    count: Extent
    config_key: str
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Stacked:
    """A parameter with one slice per expert, which checkpoints hold expert by expert; it is read, and never edited.

    Attributes:
        path: Parameter path inside the block, [experts, O, I].
        parts: Names inside the block of what makes up the slice of expert ``{}``, each [o, I], in order.
    """

    path: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One architecture family.

    Attributes:
        name: Of the table.
        model_types: ``config.model_type`` values that have this shape.
        blocks: Path of the list of blocks.
        stages: Projections in running order, those with the same input together.
        groups: Coupled axes.
        ffn_key: Config attribute of the FFN width; four times the width where it is absent or None.
        slopes_key: Config attribute for the heads whose ALiBi slopes a block keeps, where the architecture has such slopes.
        stored_as: (start of a parameter's name, its start in checkpoints), where transformers renames on loading.
        stacked: Parameters that checkpoints hold in parts.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    stages: Stages
    groups: tuple[Group, ...] = ()
    ffn_key: str = "intermediate_size"
    slopes_key: str = ""
    stored_as: tuple[tuple[str, str], ...] = ()
    stacked: tuple[Stacked, ...] = ()

    def writer(self, part: str) -> str:
        """Path inside the block of the projection by which a part (``attention``, ``mlp``) writes to the residual stream.

        Raises:
            Problem: If the blocks have no such part.
        """
        role = {"attention": "o", "mlp": "down"}[part]
        found = [item.path for stage in self.stages for item in stage if item.role == role]
        if not found:
            raise Problem(
                f"The blocks of the family {self.name} have no {part} that could leave.", why="its table lists none.", fix="`parts: block`.",
                code=Exit.INCOMPATIBLE,
            )  # fmt: skip
        return found[0]

    def sizes(self, config: Any) -> Sizes:
        """Reads the widths from a transformers config."""
        width, heads = config.hidden_size, config.num_attention_heads
        return Sizes(
            width=width,
            ffn=getattr(config, self.ffn_key, None) or 4 * width,
            heads=heads,
            groups=getattr(config, "num_key_value_heads", None) or heads,
            head=getattr(config, "head_dim", None) or width // heads,
        )


def attention(path: str) -> Stages:
    """q, k and v; then o."""
    return tuple(Projection(role, f"{path}.{role}_proj") for role in "qkv"), (Projection("o", f"{path}.o_proj"),)


def gated_mlp(path: str) -> Stages:
    """Gate and up; then down."""
    return tuple(Projection(role, f"{path}.{role}_proj") for role in ("gate", "up")), (Projection("down", f"{path}.down_proj"),)


def selective_mixer(path: str, *, step: str) -> Stages:
    """Mamba's mixer; ``step`` is its module whose output begins with the input of dt_proj."""
    taps = {"dt": f"{path}.{step}"}
    return tuple((Projection(role, f"{path}.{role}_proj", tap=taps.get(role)),) for role in ("in", "x", "dt", "out"))


def dual_mixer(path: str) -> Stages:
    """Mamba-2's mixer."""
    return tuple((Projection(role, f"{path}.{role}_proj"),) for role in ("in", "out"))


def unit_one(sizes: Sizes) -> int:
    """One entry per unit."""
    return 1


def one_head(sizes: Sizes) -> int:
    """Entries of one head, P."""
    return sizes.head


def query_group(sizes: Sizes) -> int:
    """Entries of the query heads that share one KV group, P·H/G."""
    return sizes.head * sizes.heads // sizes.groups
