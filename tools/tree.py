"""Writes the file tree of the package into README.md, from the first line of every module; ``--check`` only compares."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- tree -->", "<!-- /tree -->"


def summary(file: Path) -> str:
    """First sentence of a module's docstring."""
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return doc.split("\n")[0].split(". ")[0].rstrip(".")


def tree() -> str:
    """The tree as a code block."""
    lines = ["src/duramen/"]
    package = ROOT / "src" / "duramen"
    for item in sorted(package.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if item.suffix == ".py" and item.name != "__init__.py":
            lines.append(f"  {item.name:<18} {summary(item)}")
        elif (item / "__init__.py").is_file():
            lines.append(f"  {item.name + '/':<18} {summary(item / '__init__.py')}")
            lines += [
                f"    {file.name:<16} {summary(file)}" for file in sorted(item.glob("*.py")) if file.name != "__init__.py"
            ]
    return "```\n" + "\n".join(lines) + "\n```"


def main() -> int:
    """Compares or writes."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    new = f"{before}{BEGIN}\n{tree()}\n{END}{after}"
    if "--check" in sys.argv:
        if new != text:
            print("The file tree in README.md is out of date; run `python tools/tree.py`.")
        return int(new != text)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
