"""Fills the generated blocks of README.md and docs/: the file tree, tables of methods, settings, families and benchmarks.

    python tools/generate.py            # writes
    python tools/generate.py --check    # compares only; exit code 1 if a file is out of date

A block reads ``<!-- generated: KIND WORDS -->`` ... ``<!-- end -->``; the kinds are the functions in ``KINDS``.
"""

from __future__ import annotations

import ast
import csv
import re
import sys
from pathlib import Path

from duramen.families import known_families
from duramen.tables import explain_method, list_methods

ROOT = Path(__file__).parents[1]
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
    """One metric of a benchmark: a row per subject, a column per case (its words after the last comma).

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


def main() -> int:
    """Writes or compares."""
    stale = []
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = file.read_text(encoding="utf-8")
        new = BLOCK.sub(lambda m: f"{m[1]}\n{KINDS[m[2]](*m[3].split())}\n\n{m[4]}", text)
        if new != text:
            stale.append(str(file.relative_to(ROOT)))
            if "--check" not in sys.argv:
                file.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv:
        print(f"Out of date: {', '.join(stale)}; run `python tools/generate.py`.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
