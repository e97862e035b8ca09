"""Ways through a grid of cells, each a list of all cells in the order of its steps.

PlainMamba (arXiv 2403.17695) goes through the grid by rows and by columns, turning at every end so that each step leads to a neighbour, and both ways back.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

START, RIGHT, LEFT, UP, DOWN = range(5)
"""How a step was reached, in the order of PlainMamba's direction vectors."""


def boustrophedon(height: int, width: int, *, columns: bool = False) -> Int[Tensor, "T"]:
    """The cell of every step: by rows from the top, beginning rightwards, or by columns from the left, beginning downwards; every second one backwards.

    Args:
        height: Rows of the grid, whose cells are counted row by row.
        width: Its columns.
        columns: Whether to go by columns.
    """
    cells = torch.arange(height * width).view(height, width)
    lines = cells.T.clone() if columns else cells.clone()
    lines[1::2] = lines[1::2].flip(1)
    return lines.flatten()


def arrivals(path: Int[Tensor, "T"], width: int) -> Int[Tensor, "T"]:
    """How every step of a path through neighbours was reached; the first by none."""
    moves = {1: RIGHT, -1: LEFT, -width: UP, width: DOWN} if width > 1 else {-1: UP, 1: DOWN}
    found = torch.full_like(path, START)
    for apart, direction in moves.items():
        found[1:][path[1:] - path[:-1] == apart] = direction
    return found


def four_paths(height: int, width: int) -> Int[Tensor, "4 T"]:
    """PlainMamba's: by rows and back, by columns and back."""
    ways = (boustrophedon(height, width), boustrophedon(height, width, columns=True))
    return torch.stack([each for way in ways for each in (way, way.flip(0))])
