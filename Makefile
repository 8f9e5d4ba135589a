# Every target works on a fresh clone: .venv is made when it is missing or its pins changed.
PYTHON ?= python3
BIN := .venv/bin
STORAGE ?= rmsweep-store

.PHONY: install demo test lint test-all lock

install: .venv/installed

.venv/installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[test]'
	touch $@

demo: install
	$(BIN)/python sweeps/full_grid.py --profile laptop --storage $(STORAGE)
	$(BIN)/python benchmarks/demo_phases.py --storage $(STORAGE)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest tests
	$(BIN)/python -m pytest tests/cluster --run-alone

test-all: lint
	$(BIN)/python -m pytest tests --run-slow
	$(BIN)/python -m pytest tests/cluster --run-alone

# Rewrites the lock from what is installed; run it in a fresh .venv after changing pins in pyproject.toml.
lock: install
	$(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock
