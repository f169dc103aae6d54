# `make demo` and `make test` are all that is needed; each sets up .venv first if that has not been done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Bytecode is compiled when a module is first imported: most of what is installed here never is.
PIP_OPTIONS := install --quiet --disable-pip-version-check --no-compile -c constraints.txt
INSTALL := $(BIN)/python -m pip $(PIP_OPTIONS)
# One thread a process: the tests run in two processes, and what they compute is small.
TEST_ENV := OMP_NUM_THREADS=1
WORKERS ?= 2

.PHONY: help setup demo demo-world test test-all test-peers lint bench docs clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      trace indirect-object identification in SmolLM2-135M into runs/demo, print where the report is"
	@echo "make demo-world train a small model on a world of facts, trace its capitals back to the data: runs/demo-world"
	@echo "make test      run the tests (without the long proofs)"
	@echo "make test-all  run all of them"
	@echo "make test-peers compare results with transformer-lens and, where it is installed, auto-circuit"
	@echo "make lint      ruff and pyright"
	@echo "make bench     speed and memory beside other libraries (docs/benchmarks.md)"
	@echo "make docs      build the documentation into site/"
	@echo "make clean     remove the environments and what was generated; runs/ stays"

setup: $(VENV)/.installed-dev

# torch first: the constraint names the release, so that nothing later can pull another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Setting up $(VENV): a few minutes, once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "  torch"
	@$(INSTALL) torch
	@echo "  headwater"
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "  tools for tests and lint"
	@$(INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@$(INSTALL) -e '.[docs]'
	@touch $@

# The libraries that headwater is compared with have an environment of their own, so that they change nothing here.
$(VENV)-bench/.installed: pyproject.toml constraints.txt
	@echo "Setting up $(VENV)-bench: a few minutes, once."
	@test -x $(VENV)-bench/bin/python || $(PYTHON) -m venv $(VENV)-bench
	@$(VENV)-bench/bin/python -m pip $(PIP_OPTIONS) torch
	@$(VENV)-bench/bin/python -m pip $(PIP_OPTIONS) -e '.[bench]'
	@touch $@

# An interrupted demo goes on from where it was.
demo: $(VENV)/.installed
	@$(BIN)/headwater trace ioi --model smollm2 --out runs/demo

# The same on a small model that is trained here, whose every batch is known: when it formed, and which data formed it.
demo-world: $(VENV)/.installed
	@$(BIN)/headwater train examples/world.yaml --out runs/world
	@$(BIN)/headwater trace capitals --model runs/world --out runs/demo-world

test: setup
	$(TEST_ENV) $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

test-all: setup
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-peers: $(VENV)-bench/.installed
	@$(VENV)-bench/bin/python -m pip $(PIP_OPTIONS) -e '.[dev]'
	$(TEST_ENV) $(VENV)-bench/bin/python -m pytest tests/localize/test_peers.py -rs

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pyright -p pyrightconfig.core.json

bench: $(VENV)-bench/.installed
	$(VENV)-bench/bin/python -m benchmarks

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(VENV)-bench site .pytest_cache .ruff_cache .hypothesis
