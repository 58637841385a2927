# `make run` and `make test` need Python 3.11 or newer and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
# The tests start hundreds of processes. Without cached bytecode, each of them compiles torch again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test types tests test-deploy test-hf check clean

run: $(VENV)/installed  ## the three methods and their plain rivals, on embedded digits
	$(BIN)/fedloom demo

test: $(VENV)/installed  ## style, types, layers, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(MAKE) --no-print-directory --jobs 2 types tests

types: $(VENV)/installed
	$(BIN)/mypy

tests: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup -m "not slow and not deploy"

test-deploy: $(VENV)/installed  ## whole federations on this machine: TLS, node keys, faults (minutes)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m deploy tests/deploy

test-hf: $(VENV)/installed  ## models of Hugging Face; installs transformers and peft
	$(PIP) install --quiet --no-compile --constraint constraints.txt --editable '.[hf]'
	OMP_NUM_THREADS=1 $(BIN)/pytest -m hf

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-compile --constraint constraints.txt torch==2.13.0
	$(PIP) install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
