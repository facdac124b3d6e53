# `make demo` and `make test` work on a fresh machine that has nothing but Python 3.11 or newer.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= runs/scaling
PYTHON ?= python3# for `gpu`, `bench-gpu` and `scaling-gpu`: the interpreter that sees the device

# The first interpreter that runs, is new enough and can make environments: a name on PATH may be a shim of a
# version manager that answers with an error, and some distributions ship Python without `venv`.
FIND_PYTHON := for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
		echo "$$candidate"; exit 0; fi; done; \
	echo "surgery needs Python 3.11 or newer with the venv module; none was found on PATH" >&2; exit 1

.PHONY: help setup demo test check golden docs gpu bench bench-gpu scaling-gpu

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

setup: $(READY)  ## make .venv with everything pinned, once

$(READY): pyproject.toml constraints.txt
	@if ! $(BIN)/python -c '' >/dev/null 2>&1; then \
		python=$$($(FIND_PYTHON)); echo "making $(VENV) with $$python"; "$$python" -m venv --clear $(VENV); fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)  ## Dolly instructions into 8 categories: plan, train, evaluate, merge, reload (under 5 minutes on 2 cores)
	@PATH="$(CURDIR)/$(BIN):$$PATH" specs/demo.sh

# One thread per worker: the models are tiny, and two workers with two threads each wait for one another.
test: $(READY)  ## the whole suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal $(ARGS)

check: $(READY)  ## formatting, lint, types and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p surgery
	$(BIN)/mypy tests specs
	$(BIN)/python -m pytest -q tests/test_layout.py

golden: $(READY)  ## write the golden outputs anew; read the difference before you commit it
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --update-golden $(ARGS)

docs: $(READY)  ## write the pages of the method library anew
	$(BIN)/surgery methods --write docs/methods --specs specs

gpu:  ## the tests that need a CUDA device, with the machine's own Python
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m pytest -q -m gpu tests/gpu $(ARGS)

bench: $(READY)  ## the CPU rows of the speed table: a small encoder's step beside peft's
	$(BIN)/python -m tests.benchmarks.speed --device cpu --parts encoder $(ARGS)

bench-gpu:  ## the speed table, on a CUDA device: under ten minutes
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m tests.benchmarks.speed --all $(ARGS)

scaling-gpu:  ## plots of the step over depth, width, tokens and rank, on a CUDA device (OUT=folder)
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m tests.benchmarks.scaling --out $(OUT) $(ARGS)
