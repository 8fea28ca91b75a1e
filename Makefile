# Five lines a target; every target sets up .venv by itself.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: setup demo test test-all check bench docs conformance
setup: $(STAMP)

demo: setup
	$(BIN)/qserve demo

test: setup
	$(BIN)/pytest

test-all: setup
	$(BIN)/pytest -m 'not gpu'

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/run.py

docs: setup
	$(BIN)/python docs/generate.py

conformance: setup
	$(BIN)/python benchmarks/conformance.py
