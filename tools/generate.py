"""Fills the generated blocks of README.md and docs/: the file tree, tables of methods, settings, families and benchmarks; and writes the tutorials as a notebook.

    python tools/generate.py            # writes
    python tools/generate.py --check    # compares only; exit code 1 if a file is out of date

A block reads ``<!-- generated: KIND WORDS -->`` ... ``<!-- end -->``; the kinds are the functions in ``KINDS``.
"""

from __future__ import annotations

import ast
import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from duramen.families import known_families
from duramen.tables import explain_method, list_methods

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
CODE = re.compile(r"```python\n(.*?)\n```\n", re.DOTALL)
BLOCK = re.compile(r"^(<!-- generated: (\w+)([^>\n]*) -->\n).*?^(<!-- end -->)", re.DOTALL | re.MULTILINE)


def tree() -> str:
    """The package's files with the first sentence of each."""
    package, lines = ROOT / "src" / "duramen", ["src/duramen/"]
    for item in sorted(package.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if item.suffix == ".py" and item.name != "__init__.py":
            lines.append(f"  {item.name:<18} {_summary(item)}")
        elif (item / "__init__.py").is_file():
            lines.append(f"  {item.name + '/':<18} {_summary(item / '__init__.py')}")
            files = sorted(file for file in item.glob("*.py") if file.name != "__init__.py")
            lines += [f"    {file.name:<16} {_summary(file)}" for file in files]
    return "```text\n" + "\n".join(lines) + "\n```"


def _summary(file: Path) -> str:
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return doc.split("\n")[0].split(". ")[0].rstrip(".")


def methods() -> str:
    """Every method with its source."""
    rows = [(f"`{item['name']}`", item["kind"], item["summary"].rstrip("."), item["paper"]) for item in list_methods()]
    return _markdown(("method", "kind", "what it does", "source"), rows)


def settings(name: str) -> str:
    """The settings of one method."""
    rows = [
        (f"`{item['name']}`", item["type"].replace("|", "\\|"), f"`{_plain(item['default'])}`", item["meaning"])
        for item in explain_method(name)["settings"]
    ]
    return _markdown(("setting", "type", "default", "meaning"), rows)


def _plain(value: object) -> str:
    """A default as a recipe would write it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def families() -> str:
    """Every family table: architectures, roles and coupled groups."""
    tables = {family.name: family for family in known_families().values()}
    rows = []
    for name, family in sorted(tables.items()):
        roles = "; ".join(", ".join(item.role for item in stage) for stage in family.stages)
        types = ", ".join(f"`{item}`" for item in family.model_types)
        rows.append((name, types, roles, ", ".join(group.kind for group in family.groups)))
    return _markdown(("family", "`model_type`", "roles, by shared input", "coupled groups"), rows)


def table(file: str, *words: str) -> str:
    """One metric of a benchmark: a row per subject, a column per case (its words after the last comma), shares in ascending order.

    A colon and the start of a case may follow, to take only those cases.
    """
    metric, _, start = " ".join(words).partition(" : ")
    results, rows = ROOT / "benchmarks" / "results" / f"{file}.csv", []
    if results.is_file():
        with results.open(encoding="utf-8") as stream:
            rows = [row for row in csv.DictReader(stream) if row["metric"] == metric and row["case"].startswith(start)]
    if not rows:
        return f"*Not measured yet; `benchmarks/{file}.py` does it.*"
    cases = list(dict.fromkeys(row["case"].rpartition(", ")[2] for row in rows))
    if all(case.endswith("%") for case in cases):
        cases.sort(key=lambda case: float(case.removesuffix("%")))
    cells = {(row["subject"], row["case"].rpartition(", ")[2]): _cell(row) for row in rows}
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    body = [(subject, *(cells.get((subject, case), "") for case in cases)) for subject in subjects]
    return _markdown((metric, *cases), body)


def _cell(row: dict[str, str]) -> str:
    value = f"{float(row['value']):.4g}"
    interval = f" ({float(row['low']):.3g} to {float(row['high']):.3g})" if row["low"] and row["low"] != row["high"] else ""
    return value + interval


def _markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


KINDS = {"tree": tree, "methods": methods, "settings": settings, "families": families, "table": table}


def notebook(*pages: Path) -> str:
    """Pages one after another as a Jupyter notebook of format 4.5; their blocks of Python are its cells of code."""
    cells: list[dict[str, object]] = []
    for page in pages:
        for number, part in enumerate(CODE.split(page.read_text(encoding="utf-8"))):
            kind, more = ("code", {"execution_count": None, "outputs": []}) if number % 2 else ("markdown", {})
            cell = {
                "cell_type": kind,
                "id": f"{page.stem}-{number}",
                "metadata": {},
                "source": part.strip().splitlines(keepends=True),
            }
            cells.append(cell | more)
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return (
        json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}, indent=1, ensure_ascii=False)
        + "\n"
    )


def generated() -> Iterator[tuple[Path, str]]:
    """Every file that is generated in part or whole, with what it should hold."""
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        yield file, BLOCK.sub(lambda m: f"{m[1]}\n{KINDS[m[2]](*m[3].split())}\n\n{m[4]}", file.read_text(encoding="utf-8"))
    yield TUTORIALS / "tutorials.ipynb", notebook(TUTORIALS / "first-run.md", TUTORIALS / "many-runs.md")


def main() -> int:
    """Writes or compares."""
    stale = []
    for file, new in generated():
        if not file.is_file() or new != file.read_text(encoding="utf-8"):
            stale.append(str(file.relative_to(ROOT)))
            if "--check" not in sys.argv:
                file.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv:
        print(f"Out of date: {', '.join(stale)}; run `python tools/generate.py`.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
