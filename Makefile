# Every target sets up .venv by itself, and again when pyproject.toml or the native sources change.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
# Bytecode is left to the first import: most of what gets installed is never imported.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/csrc/*)

.PHONY: setup demo test test-all check sanitize bench gpu docs conformance clean

$(BIN)/python:
	$(PYTHON) -m venv .venv

# What users install; constraints.txt pins torch to a version that comes as a CPU build.
.venv/.runtime: $(SOURCES) | $(BIN)/python
	@echo "installing qserve and building its native kernels (some minutes the first time)"
	@$(INSTALL) --editable .
	@$(BIN)/python -c "import qserve.kernels._cpu" || echo "warning: no native kernels, qserve will be slow: see qserve doctor"
	@touch $@

# What working on it needs as well.
.venv/.dev: $(SOURCES) | $(BIN)/python
	@echo "installing qserve, its native kernels and the tools (some minutes the first time)"
	@$(INSTALL) --editable '.[dev]'
	@$(BIN)/python -c "import qserve.kernels._cpu" || echo "warning: no native kernels, qserve will be slow: see qserve doctor"
	@touch .venv/.runtime $@

setup: .venv/.dev

demo: .venv/.runtime
	$(BIN)/qserve demo

test: setup
	$(BIN)/pytest

test-all: setup
	$(BIN)/pytest -m 'not gpu'

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The native kernels on random shapes under AddressSanitizer and UndefinedBehaviorSanitizer: minutes to build, no Python.
sanitize:
	cmake -S . -B build/sanitize -DQSERVE_PYTHON=OFF -DQSERVE_SANITIZE=ON
	cmake --build build/sanitize --parallel $$(nproc)
	for family in rows attention products; do build/sanitize/tests/native/fuzz_$$family || exit 1; done

bench: setup
	$(BIN)/python benchmarks/run.py

# Tests and timings of the GPU kernels, on a machine that has a GPU.
gpu: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'triton>=3.9'
	$(BIN)/python benchmarks/gpu_calibration.py

docs: setup
	$(BIN)/python docs/generate.py

conformance: setup
	$(BIN)/python benchmarks/conformance.py

clean:
	rm -rf .venv build .mypy_cache .pytest_cache .ruff_cache
