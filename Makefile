# Everything runs in .venv, made from constraints.txt on first use.
# Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
# Many tests wait for a server, so one more worker than cores is a third faster.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print((os.cpu_count() or 1) + 1)')
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test fuzz chaos bench check docs pictures format clean

demo: .venv/installed ## restyle six photographs in five styles, look at demo/contact-sheet.png
	@$(BIN)/flux-kontext demo demo

test: .venv/installed-dev ## run all tests, with branch coverage
	@$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --cov --cov-report=term

fuzz: .venv/installed-dev ## try other inputs for everything that others can write, for some minutes
	@$(BIN)/pytest tests/fuzz --hypothesis-profile=fuzz --timeout=0 --numprocesses $(WORKERS)

chaos: .venv/installed-dev ## every fault, a thousand kills, 10,000 seeds, and write docs/reliability.md (hours; goes on where it ended)
	@PYTHONHASHSEED=0 $(BIN)/python -m tests.chaos.large --write

bench: .venv/installed-dev ## measure all that docs/performance.md tells, small, in about 15 minutes (BENCH=--whole: hours; nothing else should run)
	@$(BIN)/python benchmarks/run.py --page docs/performance.md $(BENCH)

check: .venv/installed-dev ## linters, layers and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

docs: .venv/installed-dev ## build the documentation: docs/_build/index.html
	@$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs docs/_build

pictures: .venv/installed-dev demo ## run the demo and take the pictures of the documentation (needs Chromium)
	@$(BIN)/python docs/pictures.py demo

format: .venv/installed-dev ## put the code into the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## forget the environment and what the demo made
	rm -rf .venv demo dist docs/_build docs/_generated .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; this one is %s. Name another: make PYTHON=python3.12" % sys.version.split()[0])'
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/python pyproject.toml constraints.txt
	@echo "Installing into .venv, once; this takes a minute …"
	@$(PIP) --editable .
	@touch $@

.venv/installed-dev: .venv/python pyproject.toml constraints.txt
	@echo "Installing into .venv, once; this takes two minutes …"
	@$(PIP) --editable '.[dev]'
	@touch $@ .venv/installed
