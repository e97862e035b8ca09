"""WikiText-2-raw as the literature reads it: the rows of the published data set, joined by blank lines."""

from __future__ import annotations

import tempfile
from pathlib import Path


def literature(file: str) -> str:
    """The path of a text file to evaluate on: a ``wiki.*.raw`` file is joined first, anything else is taken as it is.

    The data set has one row per line of the file, newline included, and an empty row for an empty line.
    """
    if not Path(file).name.startswith("wiki."):
        return file
    rows = Path(file).read_text(encoding="utf-8").split("\n")
    joined = Path(tempfile.mkdtemp()) / "wikitext-2.txt"
    joined.write_text("\n\n".join(f"{row}\n" if row.strip() else "" for row in rows), encoding="utf-8")
    return str(joined)
