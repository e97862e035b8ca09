"""Whether a tensor holds nothing but numbers."""

from __future__ import annotations

from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite.

    A sum is finite only if all its terms are, and takes a tenth of the time; where the sum itself overflows, the entries are looked at.
    """
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
