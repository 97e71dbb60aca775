# `make demo` and `make test` are all that a fresh machine needs: each sets up .venv first.
# They need make, git and a Python >= 3.11 with venv and pip.  Another Python: `make test PYTHON=python3.12`.

PYTHON ?= python3
# Test processes, one thread each; 0 runs everything in one process.
TEST_JOBS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp-installed

# Large wheels over a slow line.
export UV_HTTP_TIMEOUT ?= 300

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format docs package constraints clean distclean

help:
	@echo 'make setup        create $(VENV) and install the pinned dependencies (done once, by the others too)'
	@echo 'make demo         sample slide -> fit -> predict -> evaluate -> picture'
	@echo 'make test         all tests; PYTEST_ARGS="tests/geometry -k circles" for some'
	@echo 'make lint         ruff, import rules and mypy'
	@echo 'make format       ruff, with fixes'
	@echo 'make docs         HTML pages in docs/_build/html, warnings are errors'
	@echo 'make package      wheel and sdist in dist/, checked, and the wheel tried alone in a fresh environment'
	@echo 'make constraints  pin the newest versions that pyproject.toml allows'
	@echo 'make clean        remove what these leave behind; make distclean: $(VENV) too'

setup: $(STAMP)

# uv installs in a fraction of the time; where it is not to be had, or an index is set in pip's own configuration, which
# uv does not read, pip does the same.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "pixnet_sd needs Python 3.11 or newer, '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { \
	  echo "'$(PYTHON) -m venv' failed, see above. On Debian and Ubuntu it needs the package python3-venv." >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv || echo "no uv: pip installs, which takes longer" >&2
	{ test -x $(BIN)/uv && $(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'; } || \
	  $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/pixnet-sd demo $(DEMO_ARGS)

# One thread a process: two processes with two threads each on two cores are slower than with one.
test: $(STAMP)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1 MPLBACKEND=Agg \
	  $(BIN)/python -m pytest --numprocesses $(TEST_JOBS) --dist loadfile $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -E -b html docs docs/_build/html

# What a release uploads. The wheel is installed from the index as a user would, not with the pinned versions.
package: $(STAMP)
	rm -rf dist
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[package]'
	$(BIN)/python -m build
	$(BIN)/python scripts/check_package.py dist

# One file for every Python: markers tell the pins of 3.11 from those of later versions.
constraints: $(STAMP)
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --upgrade --all-extras --strip-extras --no-annotate \
	  --custom-compile-command 'make constraints' --output-file constraints.txt pyproject.toml

clean:
	rm -rf build dist docs/_build docs/generated docs/notebooks .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
