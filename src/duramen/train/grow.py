"""Depth expansion that changes nothing at first: new blocks are copies whose output projections are zero (LLaMA Pro, arXiv 2401.02415).

The blocks are divided into equal groups; after each come copies of its last block, whose attention and feed-forward add nothing to the residual stream. In the first step only
those two projections have a gradient. Caches and per-layer lists of the configuration are numbered anew. Moxin's 36 blocks are 32 grown by 4 groups of one copy (our reading).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from duramen.families.model import BlockModel
from duramen.problem import Exit, Problem
from duramen.registry import Place, method
from duramen.registry import Settings as Base
from duramen.rundir import write_json
from duramen.train.folder import open_causal, save_causal
from duramen.train.stage import MODEL, Stage

GROWN = "grown.json"
ADDING = ("o", "down", "out")
"""Roles of the projections that add to the residual stream."""


class Settings(Base):
    """Settings of growth."""

    groups: Annotated[int, Field(ge=1)] = 4
    """Equal groups of blocks, after each of which new ones come."""
    copies: Annotated[int, Field(ge=1)] = 1
    """New blocks after each group."""
    model: Place = ""
    """Folder of the model; empty for that of the stage before."""


@method("grow", title="Depth expansion", paper="arXiv 2401.02415, 2412.06845", kind="train", settings=Settings)
def apply(stage: Stage, settings: Settings) -> dict[str, Any]:
    """Writes ``model`` with more blocks and the same logits.

    Args:
        stage: Has the model.
        settings: See ``Settings``.

    Returns:
        Blocks before and after, which are new, and the largest difference of logits.
    """
    source = Path(settings.model) if settings.model else stage.need(MODEL, "grow")
    network = open_causal(source)
    grown, new = grow(network, settings.groups, settings.copies)
    save_causal(grown, stage.folder / MODEL, source)
    write_json(stage.folder / MODEL / GROWN, {"new": new})
    tokens = torch.arange(32)[None] % network.config.vocab_size
    with torch.no_grad():
        difference = float((open_causal(stage.folder / MODEL)(tokens).logits - network(tokens).logits).abs().max())
    if difference > 1e-5:
        raise Problem(
            f"The deeper model's logits differ by {difference:.3g}.", why="a new block of this family adds to the stream whatever its projections are.",
            fix="a model of another family.", code=Exit.INCOMPATIBLE,
        )  # fmt: skip
    blocks = {"before": network.config.num_hidden_layers, "after": grown.config.num_hidden_layers}
    return {"blocks": blocks, "new": new, "largest_difference": difference}


@torch.no_grad()
def grow(network: Any, groups: int, copies: int) -> tuple[Any, list[int]]:
    """A deeper model with the same logits.

    Args:
        network: A causal language model.
        groups: Equal groups of its blocks.
        copies: New blocks after each.

    Returns:
        The deeper model, and the numbers of its new blocks.

    Raises:
        Problem: If the blocks cannot be divided so, or the family's table names no projection that adds to the stream.
    """
    import copy

    from transformers import AutoModelForCausalLM

    config = network.config
    before = config.num_hidden_layers
    if before % groups:
        raise Problem(
            f"{before} blocks cannot be divided into {groups} groups.", why="every group has as many as the others.",
            fix=f"`groups` of {', '.join(str(each) for each in range(1, before + 1) if before % each == 0)}.",
        )  # fmt: skip
    size = before // groups
    old: list[int] = []
    new: list[int] = []
    for number in range(before):
        old.append(number)
        if number % size == size - 1:
            new += range(len(old), len(old) + copies)
            old += [number] * copies
    wider = copy.deepcopy(config)
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == before:
            setattr(wider, key, [value[number] for number in old])
    wider.num_hidden_layers = len(old)
    grown = AutoModelForCausalLM.from_config(wider, dtype=next(network.parameters()).dtype)
    inside = f"{BlockModel.of(network).family.blocks}."
    state = network.state_dict()
    fresh = {}
    for name in grown.state_dict():
        number, _, rest = name.removeprefix(inside).partition(".")
        there = f"{inside}{old[int(number)]}.{rest}" if name.startswith(inside) and number.isdigit() else name
        if there not in state:
            raise Problem(
                f"The deeper model wants {name}, and the model has no {there}.", why="its blocks are of several kinds, in a fixed order.",
                fix="a model whose blocks are all alike.",
            )  # fmt: skip
        fresh[name] = state[there].clone()
    grown.load_state_dict(fresh)
    model = BlockModel.of(grown)
    for block in new:
        adding = [each for each, (role, index) in model.layer_names().items() if index == block and role in ADDING]
        if not adding:
            raise Problem(
                f"Block {block} has no projection that is known to add to the stream.", why="the family's table names none.",
                fix="a model of another family.",
            )  # fmt: skip
        for name in adding:
            layer: Any = grown.get_submodule(name)
            layer.weight.zero_()
            if layer.bias is not None:
                layer.bias.zero_()
    return grown.eval(), new
