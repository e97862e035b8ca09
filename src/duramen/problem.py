"""The one exception that Duramen raises for a user's mistake: what happened, why, what to try."""

from __future__ import annotations

from enum import IntEnum
from importlib.util import find_spec


class Exit(IntEnum):
    """Exit codes of the command line."""

    OK = 0
    CHECK_FAILED = 1
    USAGE = 2
    INCOMPATIBLE = 3
    OUT_OF_BUDGET = 4


class Problem(ValueError):
    """A mistake that the user can mend, told in three parts.

    Args:
        what: What happened, with names and shapes.
        why: Why it usually happens.
        fix: What to try.
        code: Exit code of the command line.
    """

    def __init__(self, what: str, *, why: str, fix: str, code: Exit = Exit.USAGE) -> None:
        super().__init__(f"{what}\n  why: {why}\n  try: {fix}")
        self.what = what
        self.why = why
        self.fix = fix
        self.code = code


def need(what: str, *modules: str, install: str) -> None:
    """Stops where modules of an extra are missing.

    Args:
        what: Needs them.
        modules: By the names that they are imported by.
        install: What pip is to install.

    Raises:
        Problem: If one is not there.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise Problem(
            f"{what} needs {', '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not installed.",
            why="it belongs to an extra.",
            fix=f"`python -m pip install {install}`",
        )
