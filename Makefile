# make demo: train on handwritten digits, sample, report. make test: the tests to run each time.
# make test-all: all tests. make test-versions: the core tests on three sets of versions.
# make docs: the pages as a site, in .site. Each makes its own virtual environments first.
PYTHON ?= python3
OLDEST ?= python3.13
NEWEST ?= python3.13
VENV ?= .venv
CONFIG ?= configs/digits.py
WORKDIR ?= runs/digits

.PHONY: demo docs lint test test-rest test-all test-versions clean

demo: $(VENV)/.installed
	$(VENV)/bin/python -m mdt_jax.main --config=$(CONFIG) --workdir=$(WORKDIR)

docs: $(VENV)/.installed-docs
	$(VENV)/bin/mkdocs build --strict

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# Huge pages for the many small steps of tests; they would slow down processes that read, which the
# rest of the tests start.
test test-versions: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
test: lint
	$(VENV)/bin/python -m pytest -m "not (processes or docs or benches or combinations)"

# Kills, several hosts, Slurm, the pages' commands, notebooks, benches, every recipe and every pair
# of switches. Processes wait for each other, which leaves room for a third test at once.
test-rest: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -m "processes or docs or benches or combinations" --numprocesses=3

test-all: test test-rest

# The recorded numbers, a training and samples of each version of MDT, each command, the notebooks.
CORE = tests/models/test_mdt.py tests/diffusion tests/train/test_step.py \
  tests/train/test_objective.py tests/combinations/test_recipes.py tests/test_packaging.py \
  tests/test_commands.py tests/docs/test_notebooks.py
ENVIRONMENTS = .versions/oldest .versions/python3 .versions/newest
test-versions: $(ENVIRONMENTS)
	set -e; for place in $(ENVIRONMENTS); do \
	  $$place/bin/python -c "import sys, jax; print(sys.prefix, sys.version.split()[0], jax.__version__)"; \
	  $$place/bin/python -m pytest $(CORE); \
	done

.versions/oldest: NAME = $(OLDEST)
.versions/oldest: PINS = --constraint=tests/constraints-oldest.txt
.versions/python3: NAME = $(PYTHON)
.versions/newest: NAME = $(NEWEST)
$(ENVIRONMENTS): pyproject.toml tests/constraints-oldest.txt
	rm -rf $@
	$(NAME) -m venv $@
	$@/bin/python -m pip install --quiet --upgrade pip
	$@/bin/python -m pip install --quiet $(PINS) --editable ".[test-core]" || (rm -rf $@; false)
	touch $@

$(VENV)/.installed-docs: EXTRAS = [docs]
$(VENV)/.installed-test: EXTRAS = [test]
$(VENV)/.installed $(VENV)/.installed-docs $(VENV)/.installed-test: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable ".$(EXTRAS)"
	touch $@

clean:
	rm -rf $(VENV) .versions .jax_cache .site
