# Each target sets up what it needs: a fresh clone needs only Python 3.11 or later and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FL := $(BIN)/fl-sim

.PHONY: demo test test-all lint bench docs audit

$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/ready
	$(FL) run configs/quickstart.toml --out runs
	$(FL) run configs/quickstart_topk.toml --out runs
	$(FL) compare runs/quickstart-*

test: $(VENV)/ready
	$(BIN)/python -m pytest

test-all: $(VENV)/ready
	$(BIN)/python -m pytest -m 'slow or not slow' --timeout 3600

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Known weaknesses of the installed versions.
audit: $(VENV)/ready
	.ci/audit $(BIN)

bench: $(VENV)/ready
	$(FL) bench engine
	$(FL) bench codec
	$(FL) bench pruning
	$(FL) bench inference

docs: $(VENV)/ready
	mkdir -p docs
	$(BIN)/python -m fl_sim.reference > docs/config.md
