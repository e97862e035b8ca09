"""How features are sliced: over frames where frames do not meet, over rows of the image where places do not, with outputs that are written into one feature piece by piece.

A piece has a size in bytes, and not every feature the same number of pieces, so that the small features of the inner levels, which take no part in the peak, run whole or nearly so: they are most of a UNet's operators, and to start an operator costs time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from duramen.video.ledger import release


@dataclass(frozen=True)
class Slices:
    """How large.

    Attributes:
        piece: Bytes of a feature that run together, at least a frame, a row or a token of it; None for all of them.
        donate: Whether the memory of a feature that nobody reads any more is given back while the pipeline still points to it.
    """

    piece: int | None = None
    donate: bool = True

    def of(self, length: int, size: int) -> list[slice]:
        """Slices of an axis of a feature of so many bytes."""
        return list(ranges(length, 1 if self.piece is None else -(-size // self.piece)))


def ranges(length: int, count: int) -> Iterator[slice]:
    """So many slices of a length, or one for each where there are fewer; their sizes differ by one at most."""
    count = max(1, min(count, length))
    for number in range(count):
        yield slice(number * length // count, (number + 1) * length // count)


@dataclass(frozen=True)
class Joined:
    """Features side by side along their channels, which are joined frame by frame only.

    Attributes:
        parts: Each [N, c, H, W].
        last: Whether nobody reads them afterwards.
    """

    parts: tuple[Float[Tensor, "N c H W"], ...]
    last: bool = True

    @property
    def frames(self) -> int:
        """N."""
        return len(self.parts[0])

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(part.nbytes for part in self.parts)

    def taken(self, chosen: slice) -> Float[Tensor, "n C H W"]:
        """Some frames."""
        return self.parts[0][chosen] if len(self.parts) == 1 else torch.cat([part[chosen] for part in self.parts], 1)

    def owned(self, slices: Slices) -> bool:
        """Whether it is one feature that may be written over."""
        return slices.donate and self.last and len(self.parts) == 1 and _whole(self.parts[0])

    def given_back(self, slices: Slices) -> None:
        """Frees the parts, if that is wanted and they are all of what they are views of."""
        for part in self.parts if slices.donate and self.last else ():
            if _whole(part):
                release(part)


def _whole(part: Tensor) -> bool:
    return part.untyped_storage().nbytes() == part.nbytes


def piecewise(
    function: Callable[[slice], Tensor], length: int, size: int, slices: Slices, *, out: Tensor | None = None
) -> Tensor:
    """Runs a function on slices of the first axis of a feature of so many bytes, and writes what it gives into one feature: a new one, or over ``out``."""
    for chosen in slices.of(length, size):
        found = function(chosen)
        if out is None and chosen.stop - chosen.start == length:
            return found.contiguous()
        if out is None:
            out = found.new_empty(length, *found.shape[1:])
        out[chosen] = found
        del found
    assert out is not None
    return out
