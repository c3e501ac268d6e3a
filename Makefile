# Each target sets up what it needs: a fresh clone needs only Python 3.11 or later and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FL := $(BIN)/fl-sim

INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo comparison algorithms claims figures report-picture test test-all test-newest lint bench docs audit

# What runs need; the tests' and linters' packages come on top, so that a first demo does not wait for them.
$(VENV)/ready: pyproject.toml constraints.txt $(wildcard fl_sim/core/kernels/_*.[ch])
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

METHODS := configs/quickstart.toml configs/quickstart_topk.toml configs/topk_both_ways.toml configs/digits_*.toml \
  configs/everything.toml

# Every method on the digits, on text and on tables, under three seeds: a table and a page for each task, as runs of two
# metrics are not compared. What is finished is not run again.
comparison: $(VENV)/ready
	$(FL) sweep $(METHODS) --seeds 0,1,2 --html comparison.html
	for task in text table_classes table_numbers; do \
	  $(FL) sweep configs/$$task*.toml --seeds 0,1,2 --html comparison-$$task.html || exit 1; done

# What the README's picture and the measured tables of docs/benchmarks.md show: measured anew, written and drawn.
figures: $(VENV)/ready report-picture
	rm -rf runs/figures runs/comparison
	$(FL) sweep configs/quickstart.toml configs/topk_both_ways.toml configs/digits_adaptive.toml \
	  configs/digits_rate_distortion.toml rounds=40 evaluate.every=2 --seeds 0,1,2 --out runs/figures
	$(FL) sweep $(METHODS) --seeds 0,1,2 --out runs/comparison
	$(BIN)/python docs/figures/collect.py runs/figures
	$(BIN)/python docs/figures/tables.py runs/figures runs/comparison
	for name in accuracy_by_traffic bytes_by_section one_round packages; do $(BIN)/python docs/figures/$$name.py; done

# The tables of docs/algorithms.md: every algorithm on two tasks under three seeds. What is finished is not run again.
algorithms: $(VENV)/ready
	$(BIN)/python docs/figures/algorithms.py runs/algorithms

# docs/claims_digits.md and docs/claims_roles.md with their pictures: published methods beside what their papers claim of bytes.
claims: $(VENV)/ready
	$(FL) reproduce --all --seeds 0,1,2 --jobs 2
	$(FL) reproduce --all --seeds 0,1,2 --task roles --jobs 2
	cp runs/claims/claims_* docs/

# docs/figures/report.png: the report page of a run, photographed by Chromium.
report-picture: $(VENV)/ready
	rm -rf runs/picture
	$(FL) run configs/topk_both_ways.toml evaluate.every=2 --out runs/picture
	$(BIN)/python docs/figures/photograph.py runs/picture/topk-both-ways-*

# Two processes of one thread each, with whole files, so that what a file's tests share is made once. Compiled before, as
# dozens of processes start that would each compile the packages where PYTHONDONTWRITEBYTECODE is set. Only the plugins that
# are needed: the others, and Hypothesis whose package pytest rewrites for its plugin, take a second of each process.
test: $(VENV)/dev
	$(BIN)/python -m compileall -q fl_sim strategies clients
	OMP_NUM_THREADS=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(BIN)/python -m pytest -p xdist.plugin -p pytest_timeout \
		-n 2 --dist loadfile

test-all: $(VENV)/dev
	FL_SIM_ALL_EXAMPLES=1 $(BIN)/python -m pytest -m 'slow or not slow' --timeout 3600

# The tests with the newest versions that pyproject.toml allows, in an environment of its own; `make test` pins them.
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade -e '.[dev]'
	.venv-newest/bin/python -m pytest -n 2 --dist loadfile

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
