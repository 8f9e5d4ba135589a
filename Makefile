# Every target works on a fresh clone: .venv is made when it is missing or its pins changed.
PYTHON ?= python3
BIN := .venv/bin
STORAGE ?= rmsweep-store
SLOW :=

.PHONY: install demo test lint test-all without-ray lock

install: .venv/installed

.venv/installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[test]'
	touch $@

demo: install
	$(BIN)/python sweeps/full_grid.py --profile laptop --storage $(STORAGE)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Tests without Ray side by side, one thread each, beside lint, as some of them only wait; then those that share the
# host's Ray, one after another; `ray up` last, in a process of its own: `ray down` ends every Ray of the host, and it is
# skipped where somebody runs one.
test: install
	$(MAKE) --jobs=2 lint without-ray
	$(BIN)/python -m pytest tests/ray tests/faults -m ray $(SLOW)
	$(BIN)/python -m pytest tests/cluster --run-alone

test-all: install
	$(MAKE) test SLOW=--run-slow

without-ray: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m "not ray" \
		--numprocesses auto --maxprocesses 8 --dist worksteal $(SLOW)

# Rewrites the lock from what is installed; run it in a fresh .venv after changing pins in pyproject.toml.
lock: install
	$(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock
