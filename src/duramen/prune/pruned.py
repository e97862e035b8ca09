"""What every method returns that prunes or rounds a matrix."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Bool, Float
from torch import Tensor

from duramen.grids import Quantized
from duramen.prune.reconstruct import output_error


@dataclass(frozen=True)
class Pruned:
    """A pruned or rounded weight matrix.

    Attributes:
        weight: [O, I], in the dtype of the given weight, exactly zero where pruned.
        pruned: bool [O, I], True where a weight was removed, or had to stay removed. A kept weight may be zero too.
        error: tr(ΔW·gram·ΔWᵀ), at the scale of the given Gram, without damping.
        report: Further figures of the method, such as iterations and the damping used.
        quantized: The codes that the weights stand for, if they were rounded.
    """

    weight: Float[Tensor, "O I"]
    pruned: Bool[Tensor, "O I"]
    error: float
    report: dict[str, float] = field(default_factory=dict)
    quantized: Quantized | None = None


def finish(
    weight: Float[Tensor, "O I"],
    edited: Float[Tensor, "O I"],
    pruned: Bool[Tensor, "O I"],
    gram: Float[Tensor, "I I"],
    *,
    error: float | None = None,
    **report: float,
) -> Pruned:
    """Casts to the weight's dtype, applies the mask once more, and measures the error of what is left, if it is not known."""
    result = edited.to(weight.dtype).masked_fill(pruned, 0)
    return Pruned(result, pruned, output_error(weight, result, gram) if error is None else error, report)
