"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

from duramen.problem import Problem

SIZES = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def is_size(text: str) -> bool:
    """Whether this reads as a size: a number above zero and one of ``SIZES``."""
    return _bytes(text) > 0


def read_size(text: str, what: str) -> int:
    """Bytes of `200MB` or `2.5GiB`.

    Args:
        text: As it was written.
        what: For which a size is needed, as `--memory`.

    Raises:
        Problem: If it reads otherwise, or is nothing.
    """
    if not is_size(text):
        raise Problem(
            f"`{what} {text}` is no size.",
            why=f"it is a number above zero and a unit: {', '.join(SIZES)}.",
            fix=f"`{what} 4GB`.",
        )
    return int(_bytes(text))


def _bytes(text: str) -> float:
    found = re.fullmatch(rf"(\d+(?:\.\d+)?)({'|'.join(SIZES)})", text)
    return float(found[1]) * SIZES[found[2]] if found else 0.0
