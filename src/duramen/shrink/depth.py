"""Depth: whole blocks, or the attention or MLP of a block, leave.

The score is the influence of "ShortGPT" (arXiv 2403.03853), 1 − cos(input, output) of what would leave, on the hidden states of the model as
it is: what hardly turns the residual stream can go. Parts that are left out are listed in ``per_layer_config``; without whole blocks the
model stays a stock one, only shorter. The attention of the first block always stays: generation reads the length of the cache from it.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from duramen.calibrate.walker import Records, Walk, walk_blocks
from duramen.families import OWN
from duramen.families.model import BlockModel, Model, has_module, run_block
from duramen.problem import Exit, Problem
from duramen.registry import Settings as MethodSettings
from duramen.registry import method
from duramen.shrink.plan import Plan, digest
from duramen.shrink.surgery import Surgery, masked, silenced

Part = Literal["block", "attention", "mlp"]
Influences = list[float | None]


class Settings(MethodSettings):
    """Settings of depth pruning."""

    parts: Part = "block"
    """What leaves: whole blocks, or only their attention or their MLP."""
    count: int = Field(ge=0)
    """How many leave."""
    protect: tuple[int, ...] = ()
    """Blocks that stay whole."""

    @property
    def undoes(self) -> tuple[str, ...]:
        """See ``duramen.order``."""
        return ("codes", "reduction")


@torch.no_grad()
def influences(model: BlockModel, tokens: Tensor, parts: Part) -> Influences:
    """1 − cos of the hidden states after every block with and without what would leave, averaged over tokens.

    Args:
        model: The model; it stays as it is.
        tokens: Token ids, [S, T].
        parts: What would leave. A whole block leaves its input (ShortGPT); for a part the comparison is ours.

    Returns:
        One for every block; None where the part has left before.

    Raises:
        Problem: If blocks of some kind never have such a part.
    """
    gone = _left_before(model, parts)
    hidden, calls = model.capture(tokens)
    found: Influences = []
    for index in range(len(model.blocks)):
        with model.opened(index) as block:
            after = run_block(block.module, hidden, calls[index])
            without = hidden
            if parts != "block" and index not in gone:
                with silenced(block.module, model.family, parts):
                    without = run_block(block.module, hidden, calls[index])
        turned = 1 - float(torch.nn.functional.cosine_similarity(without.float(), after.float(), dim=-1).mean())
        found.append(None if index in gone else turned)
        hidden = after
    return found


def _left_before(model: BlockModel, parts: Part) -> list[int]:
    """Blocks that have lost the part already."""
    if parts == "block":
        return []
    path = model.family.writer(parts)
    lacking = [number for number, block in enumerate(model.blocks) if not has_module(block, path)]
    if lacking and not str(model.config.model_type).startswith(OWN):
        raise Problem(
            f"Blocks {', '.join(map(str, lacking))} have no {parts} that could leave.", why="in a hybrid the blocks are of several kinds.",
            fix="`parts: block`.", code=Exit.INCOMPATIBLE,
        )  # fmt: skip
    return lacking


def choose(model: BlockModel, scores: Influences, settings: Settings) -> Plan:
    """The plan in which the blocks of least influence lose the part.

    Raises:
        Problem: If so many cannot leave, or a protected block does not exist.
    """
    missing = sorted(index for index in settings.protect if not 0 <= index < len(scores))
    if missing:
        raise Problem(
            f"`protect` names blocks {missing}, and the model has blocks 0 to {len(scores) - 1}.",
            why="they are counted from 0.",
            fix=f"numbers from 0 to {len(scores) - 1}.",
        )
    stay = {*settings.protect, *((0,) if settings.parts == "attention" else ())}
    free = [(score, index) for index, score in enumerate(scores) if score is not None and index not in stay]
    most = len(free) - (settings.parts == "block" and not stay)
    if settings.count > most:
        raise Problem(
            f"{settings.count} of {len(scores)} blocks are to lose their {settings.parts}, and at most {most} can.",
            why="one block stays, the protected ones do, and so does the attention of the first one, which generation needs; what has left before cannot leave.",
            fix=f"`count: {most}`, or fewer blocks in `protect`.",
        )
    leave = sorted(index for _, index in sorted(free)[: settings.count])
    made_by = {"method": "depth", "settings": settings.model_dump(mode="json"), "influence": scores}
    if settings.parts == "block":
        return Plan(digest(model), len(scores), dropped=tuple(leave), made_by=made_by)
    return Plan(digest(model), len(scores), skipped=dict.fromkeys(leave, (settings.parts,)), made_by=made_by)


def predicted(model: BlockModel, settings: Settings) -> Surgery:
    """What the settings come to, whichever blocks it will be."""
    gone = _left_before(model, settings.parts)
    return Surgery(
        model, choose(model, [None if index in gone else -float(index) for index in range(len(model.blocks))], settings)
    )


@method("depth", title="Depth pruning", paper="arXiv 2403.03853", kind="shrink", settings=Settings)
def apply(model: Model, tokens: Tensor, *, walk: Walk | None = None, **settings: object) -> Records:
    """Lets the blocks or parts of least influence leave; a model in memory stays as it is, and ``walk.reshape`` has the plan."""
    chosen, walk = Settings.model_validate(settings), walk or Walk()
    blocks = BlockModel.of(model)
    first = tokens[: walk.batch_size]
    plan = Plan.from_json(walk.memo("plan", lambda: choose(blocks, influences(blocks, first, chosen.parts), chosen).to_json()))
    walk.reshape = Surgery(blocks, plan)
    if walk.store is None:
        return []
    with masked(blocks, plan):
        return walk_blocks(blocks, tokens, lambda layers, statistics: lambda layer: {}, [], walk=walk)
