# Every target sets up what it needs in .venv; nothing has to be installed by hand.
.DEFAULT_GOAL := help
.PHONY: help setup demo serve test check bench protos
SHELL := /bin/bash

PYTHON := $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -c constraints.txt

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: .venv/dev  ## everything a developer needs, in .venv

demo: .venv/all  ## build the demo model's table, serve it, complete three prompts over HTTP, stop
	@$(BIN)/tolhouse demo

serve: .venv/all  ## the same system, left running until Ctrl-C
	@$(BIN)/tolhouse serve

test: .venv/dev  ## all tests
	$(BIN)/python -m pytest -q

check: .venv/dev  ## style, types, and generated code against the protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_house.py

bench: .venv/dev  ## quick benchmarks; results are kept in loadtest/LOG.md
	$(BIN)/python -m loadtest.fetch --quick
	$(BIN)/python -m loadtest.codecs --quick
	$(BIN)/python -m loadtest.build --quick
	$(BIN)/python -m loadtest.decode --quick
	$(BIN)/python -m loadtest.pace --quick

protos: .venv/dev  ## generate services/tolhouse/v1 from protos/
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=services --pyi_out=services --grpc_python_out=services protos/tolhouse/v1/*.proto

.venv/bin/python:
	@PYTHON=$(PYTHON) deploy/venv.sh .venv

.venv/all: .venv/bin/python pyproject.toml constraints.txt
	@echo "· installing into .venv" >&2
	@$(INSTALL) -e '.[all]'
	@touch $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt
	@echo "· installing into .venv" >&2
	@$(INSTALL) -e '.[dev]'
	@touch $@ .venv/all
