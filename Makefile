# Everything is installed into .venv from requirements.lock, hashes checked; the machine brings python3 (3.11 or newer)
# and make. No target needs root, and none starts a container.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ARGS ?=
# Every worker imports torch: that takes twice as long where Python may not keep what it compiled.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo up test chaos lint bench lock clean

help:  ## Show this list
	@echo "Maskline: images into segmentation masks"
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## Install what is locked into .venv; at once when nothing changed

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Maskline needs Python 3.11 or newer: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# Only uv's own lines of the lock: pip installs uv, checked by hash, and uv installs everything else.
	@test -x $(BIN)/uv || { \
	    $(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null; \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --only-binary :all: \
	        -r <(awk '/^[^ #]/ {ours = /^uv==/} ours' requirements.lock); }
	@echo "Installing the locked packages into $(VENV) …"
	@$(BIN)/uv pip sync --quiet --require-hashes --python $(BIN)/python requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup  ## Start everything, segment a drawn scene through the REST API, show what came out
	@$(BIN)/maskline demo $(ARGS)

up: setup  ## Run the whole service on this machine until Ctrl-C
	@$(BIN)/maskline up $(ARGS)

test: setup  ## Run the tests against real PostgreSQL, Redis and S3; ARGS go to pytest
	@$(BIN)/python -m pytest $(ARGS)

chaos: setup  ## Kill everything there is, many times, under a load; ARGS as --kills 200 --seed 1
	@$(BIN)/python -m tests.chaos --json $(ARGS)

lint: setup  ## Check style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: setup  ## Measure; ARGS name a benchmark, without it they are listed
	@$(BIN)/python -m bench $(ARGS)

lock: setup  ## Write requirements.lock anew from pyproject.toml; ARGS=--upgrade for newer versions
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --all-extras \
	    --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
	    --output-file requirements.lock $(ARGS) pyproject.toml

clean:  ## Remove .venv, caches and demo-output; the data in .maskline stays
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-output
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
