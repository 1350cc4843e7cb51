# Every target works from a bare clone: it makes .venv and installs exactly what it needs, once per change of pyproject.toml.

PYTHON ?= python3
BIN := .venv/bin
# Tests of a file share what takes long to make; the files that take longest come first.
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder
# moshi stays beside a newer torch (--no-deps), which pip would otherwise report as a conflict on every later install.
INSTALL := $(BIN)/python -m pip install -qq --no-warn-conflicts --disable-pip-version-check
SAY := @printf '==> %s\n'

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo serve-demo test test-all test-fast test-lowest test-page parity test-targets lint soak bench

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.run ## transcribe real recordings of spoken digits, whole and live
	@$(BIN)/python examples/demo.py

serve-demo: .venv/.serve ## a server of the embedded models on this machine, with a page
	@$(BIN)/dsm-jax serve

test: .venv/.dev ## most tests, in less than four minutes: no network, no GPU, no torch
	@$(BIN)/python -m pytest $(PARALLEL) -m 'not long and not gpu and not browser'

test-all: .venv/.dev ## these and the tests that take more than a second each
	@$(BIN)/python -m pytest $(PARALLEL) -m 'not gpu and not browser'

test-fast: .venv/.dev ## the tests that take a second or less each
	@$(BIN)/python -m pytest $(PARALLEL) -m 'not slow and not long and not gpu and not browser'

test-lowest: .venv/.lowest ## the tests with the lowest versions of all packages that pyproject.toml allows
	@.lowest/bin/python -m pytest $(PARALLEL) -m 'not gpu and not browser'

test-page: .venv/.page ## the server's page in a headless Chromium, which must be there with its driver
	@$(BIN)/python -m pytest -m browser

parity: .venv/.parity ## the PyTorch references, live, side by side with this library
	@NO_TORCH_COMPILE=1 NO_CUDA_GRAPH=1 $(BIN)/python -m pytest tests/parity

test-targets: .venv/.targets ## the programs compiled for a TPU and for a GPU that need not be there
	@$(BIN)/python -m pytest -n auto --dist worksteal tests/targets

lint: .venv/.dev ## ruff and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

soak: .venv/.dev ## a server under load for some 35 minutes; fails where it breaks a promise
	@$(BIN)/python -m tests.benchmarks.serving

bench: .venv/.parity ## speed against the references on this machine, as JSON lines
	@NO_TORCH_COMPILE=1 NO_CUDA_GRAPH=1 $(BIN)/python -m tests.benchmarks

$(BIN)/python:
	$(SAY) 'making .venv'
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or \
	  sys.exit(f"found Python {v}, need 3.11 or newer: name one, as in make PYTHON=python3.11")'
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/.run: pyproject.toml | $(BIN)/python
	$(SAY) 'installing the library into .venv'
	@$(INSTALL) -e .
	@touch $@

# The links show pyright, which cannot follow an editable install's mapping, where dsm_jax.convert is.
.venv/.dev: pyproject.toml | $(BIN)/python
	$(SAY) 'installing the library and its development tools into .venv'
	@$(INSTALL) -e '.[dev]'
	@mkdir -p .venv/types/dsm_jax
	@ln -sfn ../../../convert ../../../dsm_jax/__init__.py .venv/types/dsm_jax/
	@touch .venv/.run $@

.venv/.serve: pyproject.toml .venv/.run | $(BIN)/python
	$(SAY) 'installing what a server needs into .venv'
	@$(INSTALL) -e '.[serve]'
	@touch $@

.venv/.page: pyproject.toml .venv/.dev | $(BIN)/python
	$(SAY) 'installing the driver of a browser into .venv'
	@$(INSTALL) -e '.[dev,page]'
	@touch $@

.venv/.lowest: pyproject.toml | $(BIN)/python
	$(SAY) 'installing the library and its development tools in their lowest versions into .lowest'
	@$(INSTALL) 'uv>=0.8'
	@$(BIN)/uv venv -q --clear --seed --python $(BIN)/python .lowest
	@$(BIN)/uv pip install -q --python .lowest/bin/python --compile-bytecode --resolution lowest-direct -e '.[dev]'
	@touch $@

.venv/.parity: pyproject.toml Makefile .venv/.dev | $(BIN)/python
	$(SAY) 'installing the PyTorch references into .venv'
	@$(INSTALL) -e '.[dev,parity]'
	@$(INSTALL) --no-deps 'moshi>=0.2.13'
	@touch $@

# Apart from .venv's own packages, as an installed plugin changes what JAX does at import.
.venv/.targets: pyproject.toml tests/targets/plugins.py .venv/.dev
	$(SAY) 'downloading compilers for TPU and GPU into .venv/targets'
	@rm -rf .venv/targets
	@$(BIN)/python -m tests.targets.plugins >.venv/targets.txt
	@$(INSTALL) --no-deps --target .venv/targets -r .venv/targets.txt
	@touch $@
