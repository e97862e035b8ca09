"""README and docs: their commands parse, their Python runs, their links and figures exist."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main
from click.testing import CliRunner

from duramen.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = sorted(
    {
        match[1].split("  #")[0].strip()
        for page in PAGES
        for match in re.finditer(r"^\$ (?:\.venv/bin/)?(duramen .*)$", page.read_text(), re.MULTILINE)
    }
)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_docs_is_one(line):
    """The command exists and takes these arguments; what it does is tested elsewhere."""
    group = typer.main.get_command(app)
    name, *words = shlex.split(line)[1:]
    assert name in group.commands
    command = group.commands[name]
    with command.make_context(name, words, resilient_parsing=False) as context:
        assert context.args == []
    assert CliRunner().invoke(group, [name, "--help"]).exit_code == 0


def test_the_tensor_example_of_the_docs_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "index.md").read_text(), re.DOTALL)
    exec(compile(blocks[-1], "docs/index.md", "exec"), {})


def test_the_python_example_of_the_readme_runs(llama, texts, tmp_path, monkeypatch):
    """On a tiny model in the place of the embedded one."""
    import duramen

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    recipe = {
        "calibration": {"text": [str(texts[0])], "sequences": 4, "length": 32},
        "steps": [
            {"method": "multiweight", "sparsity": 0.5, "damping": 0.1},
            {"method": "evaluate", "text": [str(texts[1])], "length": 32, "windows": 2, "prompts": [], "latency": False},
        ],
    }
    real = duramen.run
    monkeypatch.setattr(duramen, "run", lambda *_: real(recipe, str(llama), tmp_path / "out"), raising=False)
    exec(compile(code, "README.md", "exec"), {})


def test_the_tutorials_run_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("first-run", "many-runs"):
        page = ROOT / "docs" / "tutorials" / f"{name}.md"
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
            there = {} if number == 0 else there
            exec(compile(code, f"{page.name}, block {number}", "exec"), there)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_method_has_a_page_and_a_recipe():
    from duramen.registry import method_modules

    for name in method_modules():
        assert (ROOT / "docs" / "methods" / f"{name}.md").is_file()
        used = [file for file in (ROOT / "recipes").glob("*.yaml") if f"method: {name}" in file.read_text()]
        assert used, f"no recipe uses {name}"


def test_figures_of_the_benchmarks_have_all_columns():
    import csv

    files = sorted((ROOT / "benchmarks" / "results").glob("*.csv"))
    assert files
    for file in files:
        with file.open() as stream:
            for row in csv.DictReader(stream):
                assert row["case"], file
                assert row["metric"], file
                assert float(row["value"]) >= 0 or "above" in row["metric"], "only differences may be negative"
                assert row["versions"], file
                assert row["machine"], file
                assert row["date"], file
                if row["peer"]:
                    assert float(row["ratio"]) == pytest.approx(float(row["value"]) / float(row["peer_value"]), rel=1e-3)
