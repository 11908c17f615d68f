# make demo: train on handwritten digits, sample, report. make test: the tests.
# Both make their own virtual environment first.
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/digits.py
WORKDIR ?= runs/digits

# Steps on a CPU are about a fifth faster when glibc backs their buffers with huge pages.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test clean

demo: $(VENV)/.installed
	$(VENV)/bin/python -m mdt_jax.main --config=$(CONFIG) --workdir=$(WORKDIR)

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
