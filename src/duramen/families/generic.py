"""A table for an architecture that has none: blocks and linear layers are inferred, roles are the layers' own names.

The guess: of all lists of equal modules the one with most linear parameters holds the blocks, every linear layer in any of them is a projection, and each is a stage
of its own in the order of definition. Nothing is known of what is coupled. Used only where the user allows it.
"""

from __future__ import annotations

from itertools import chain

from torch import nn

from duramen.families.table import Family, Projection
from duramen.problem import Exit, Problem


def infer_family(network: nn.Module) -> Family:
    """Guesses the table of a network (real or on the meta device).

    Raises:
        Problem: If there is no list of equal blocks with linear layers.
    """
    lists = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(item) for item in module}) == 1
    ]
    path, blocks = max(lists, key=lambda item: _linear_parameters(item[1]), default=("", nn.ModuleList()))
    stages = tuple((projection,) for projection in dict.fromkeys(chain.from_iterable(map(_projections, blocks))))
    if not stages:
        raise Problem(
            f"No list of equal blocks with linear layers in {type(network).__name__}.",
            why="the architecture is not a stack of blocks, or its layers are not `nn.Linear`.",
            fix="write a family table (docs: families).",
            code=Exit.INCOMPATIBLE,
        )
    return Family(name="generic", model_types=(), blocks=path, stages=stages)


def _linear_parameters(module: nn.Module) -> int:
    return sum(item.weight.numel() for item in module.modules() if isinstance(item, nn.Linear))


def _projections(block: nn.Module) -> list[Projection]:
    return [
        Projection(name.rsplit(".", 1)[-1], name) for name, module in block.named_modules() if isinstance(module, nn.Linear)
    ]
