# make demo: train on handwritten digits, sample, report. make test: the tests.
# Both make their own virtual environment first.
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/digits.py
WORKDIR ?= runs/digits

.PHONY: demo test clean

demo: $(VENV)/.installed
	$(VENV)/bin/python -m mdt_jax.main --config=$(CONFIG) --workdir=$(WORKDIR)

# Huge pages for the many small steps of tests, in processes that keep no memory themselves.
test: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
test: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest

$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) .jax_cache
