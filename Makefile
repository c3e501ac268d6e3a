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

# Known weaknesses of the installed versions; where the advisories cannot be reached, the versions, for somebody to look up.
audit: $(VENV)/ready
	test -x $(BIN)/pip-audit || $(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --skip-editable --progress-spinner off --timeout 5 || ( \
	  $(BIN)/python -c "import urllib.request as u; u.urlopen('https://pypi.org/pypi/pip/json', timeout=5)" 2> /dev/null \
	  && exit 1 ; echo "pip-audit could not reach the advisories; installed:"; \
	  $(BIN)/python -m pip list --disable-pip-version-check --format freeze )

bench: $(VENV)/ready
	$(FL) bench engine
	$(FL) bench codec
	$(FL) bench pruning
	$(FL) bench inference

docs: $(VENV)/ready
	mkdir -p docs
	$(BIN)/python -m fl_sim.reference > docs/config.md
