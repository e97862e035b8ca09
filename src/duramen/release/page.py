"""The page of a release: its class as a badge, every component with its files and licence, and what the next class needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from duramen.report.page import render
from duramen.rundir import write_text

MARKS = {"included": "there", "missing": "missing", "unlicensed": "no licence", "invalid": "licence not open"}


def write_page(file: Path, found: dict[str, Any]) -> None:
    """Writes one self-contained page.

    Args:
        file: To write.
        found: Of ``duramen.release.release.release``.
    """
    write_text(file, render("release.html.jinja", found=found, marks=MARKS, roman={1: "I", 2: "II", 3: "III"}))
