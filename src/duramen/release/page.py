"""The page of a release: its class as a badge, every component with its files and licence, and what the next class needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from duramen.rundir import write_text

MARKS = {"included": "there", "missing": "missing", "unlicensed": "no licence", "invalid": "licence not open"}


def write_page(file: Path, found: dict[str, Any]) -> None:
    """Writes one self-contained page.

    Args:
        file: To write.
        found: Of ``duramen.release.release.release``.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("duramen.release", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Path(__file__).parents[1] / "report" / "style.css"
    further = next((level for level in (3, 2, 1) if found["class"] == 0 or level < found["class"]), None)
    page = environment.get_template("page.html.jinja").render(
        found=found, style=style.read_text(encoding="utf-8"), marks=MARKS, roman={1: "I", 2: "II", 3: "III"}, further=further,
    )  # fmt: skip
    write_text(file, page)
