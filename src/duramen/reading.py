"""Files that may be anything: what cannot be understood is told by its name, whatever went wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from duramen.problem import Exit, Problem


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Whatever goes wrong inside is the file's fault, but for a package or memory that is not there.

    Args:
        file: Of which something is made inside.

    Raises:
        Problem: In the place of any other error.
    """
    try:
        yield
    except (Problem, MemoryError):
        raise
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        raise Problem(
            f"{file} needs the package {package or 'that is named here'}, which is not installed: {error}.", why="it is an extra.",
            fix=f"`python -m pip install {package}`" if package else "that package.", code=Exit.INCOMPATIBLE,
        ) from error  # fmt: skip
    except Exception as error:
        raise Problem(
            f"{file} cannot be understood: {type(error).__name__}: {str(error)[:200]}.", why="it was cut off, changed by hand, or is of another version.",
            fix="the file as it was written, or make it anew.", code=Exit.INCOMPATIBLE,
        ) from error  # fmt: skip


def read_lines(file: Path) -> list[tuple[int, str]]:
    """The lines of a file of JSON lines that hold something, with their numbers from 1; what else ends lines for Unicode may stand inside a text.

    Raises:
        Problem: If it is no text.
    """
    with reading(file):
        lines = file.read_text(encoding="utf-8").split("\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        Problem: If it is not there, or holds something else.
    """
    with reading(file):
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"an object was expected, not {type(found).__name__}")
    return found
