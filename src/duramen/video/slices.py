"""How features are sliced: over frames where frames do not meet, over rows of the image where places do not, with outputs that are written into one feature piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from duramen.video.ledger import release


@dataclass(frozen=True)
class Slices:
    """How many.

    Attributes:
        frames: Of the frames of a feature, all videos of a batch counted.
        rows: Of the rows of an image.
        donate: Whether the memory of a feature that nobody reads any more is given back while the pipeline still points to it.
    """

    frames: int = 1
    rows: int = 1
    donate: bool = True


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

    def taken(self, chosen: slice) -> Float[Tensor, "n C H W"]:
        """Some frames."""
        return self.parts[0][chosen] if len(self.parts) == 1 else torch.cat([part[chosen] for part in self.parts], 1)

    def given_back(self, slices: Slices) -> None:
        """Frees the parts, if that is wanted and they are all of what they are views of."""
        for part in self.parts if slices.donate and self.last else ():
            if part.untyped_storage().nbytes() == part.numel() * part.element_size():
                release(part)


def by_frames(function: Callable[[slice], Tensor], frames: int, slices: Slices) -> Tensor:
    """Runs a function on frames after frames, and writes what it gives into one feature."""
    out: Tensor | None = None
    for chosen in ranges(frames, slices.frames):
        found = function(chosen)
        if chosen.stop - chosen.start == frames:
            return found.contiguous()
        if out is None:
            out = found.new_empty(frames, *found.shape[1:])
        out[chosen] = found
        del found
    assert out is not None
    return out
