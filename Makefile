# Every target makes .venv itself, so that `make demo` or `make test` works on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
DEMO_DIR ?= jobs/demo

.PHONY: setup check test slow demo bench
.DEFAULT_GOAL := setup

setup: .venv/.complete

.venv/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

test: setup
	$(BIN)/pytest

slow: setup
	$(BIN)/pytest -m slow

demo: setup
	$(BIN)/userrep run --config demo --workdir $(DEMO_DIR)

bench: setup
	for name in ingest plan contrastive_loss item_encoder input_pipeline; do $(BIN)/python -m benchmarks.$$name; done
