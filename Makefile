# Each target sets up what it needs: a fresh clone needs only Python 3.11 or later and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FL := $(BIN)/fl-sim

INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo comparison test test-all lint bench docs audit

# What runs need; the tests' and linters' packages come on top, so that a first demo does not wait for them.
$(VENV)/ready: pyproject.toml constraints.txt fl_sim/core/kernels/_compiled.c
	@echo "Setting up $(VENV): PyTorch, Ray, Flower and others, some GB; this takes minutes, once."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(VENV)/dev: $(VENV)/ready
	$(INSTALL) -e '.[dev]'
	touch $@

demo: $(VENV)/ready
	$(FL) run configs/quickstart.toml --out runs
	$(FL) run configs/quickstart_topk.toml --out runs
	$(FL) compare runs/quickstart-*

# Every method on the digits under three seeds: one table, one page. What is finished is not run again.
comparison: $(VENV)/ready
	$(FL) sweep configs/quickstart.toml configs/quickstart_topk.toml configs/topk_both_ways.toml configs/digits_*.toml \
	  configs/everything.toml --seeds 0,1,2 --html comparison.html

test: $(VENV)/dev
	$(BIN)/python -m pytest

test-all: $(VENV)/dev
	$(BIN)/python -m pytest -m 'slow or not slow' --timeout 3600

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Known weaknesses of the installed versions.
audit: $(VENV)/dev
	.ci/audit $(BIN)

bench: $(VENV)/ready
	$(FL) bench engine
	$(FL) bench codec
	$(FL) bench pruning
	$(FL) bench inference

docs: $(VENV)/dev
	mkdir -p docs
	$(BIN)/python -m fl_sim.config.reference > docs/config.md
	$(BIN)/python -m fl_sim.report.schema > docs/summary.schema.json
