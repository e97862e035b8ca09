"""Size limits of the source: files of at most 500 lines (median 150), functions of at most 100 (95th percentile 60, median 12)."""

from __future__ import annotations

import ast
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def function_lengths(file: Path) -> list[tuple[int, str]]:
    """(lines of the body without its docstring, name) of every function of a file."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            found.append(((node.end_lineno or 0) - body[0].lineno + 1, f"{file.relative_to(ROOT)}:{node.name}"))
    return found


def check() -> list[str]:
    """What is over its limit, one line each."""
    files = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in sorted((ROOT / "src").rglob("*.py"))}
    functions = sorted(item for file in files for item in function_lengths(file))
    lengths = [length for length, _ in functions]
    wrong = [f"{file.relative_to(ROOT)}: {lines} lines, at most 500" for file, lines in files.items() if lines > 500]
    wrong += [f"{name}: {length} lines, at most 100" for length, name in functions if length > 100]
    figures = {
        "median lines of a file": (statistics.median(files.values()), 150),
        "median lines of a function": (statistics.median(lengths), 12),
        "95th percentile of functions": (lengths[int(len(lengths) * 0.95)], 60),
    }
    for what, (value, limit) in figures.items():
        print(f"{what}: {value:g} (at most {limit})")
        wrong += [f"{what}: {value:g}, at most {limit}"] if value > limit else []
    return wrong


if __name__ == "__main__":
    problems = check()
    print("\n".join(problems))
    sys.exit(bool(problems))
