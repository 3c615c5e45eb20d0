# Every target sets up what it needs in .venv; nothing has to be installed by hand.
.DEFAULT_GOAL := help
.PHONY: help setup demo serve test test-fast check bench cases chaos fuzz skew compose-test science-check science soak protos docs wheel audit sbom
SHELL := /bin/bash

# glibc's allocator as in the images: deploy/Dockerfile has the reasons
export MALLOC_ARENA_MAX := 2
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 268435456

PYTHON := $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -c constraints.txt

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 15

setup: .venv/dev  ## everything a developer needs, in .venv

demo: .venv/all  ## build the demo model's table, serve it, complete three prompts over HTTP, stop
	@$(BIN)/tolhouse demo

serve: .venv/all  ## the same system, left running until Ctrl-C
	@$(BIN)/tolhouse serve

test: .venv/dev  ## all tests, three files at a time: most of them wait for processes
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

test-fast: .venv/dev  ## the unit tests, within 90 seconds
	$(BIN)/python -m pytest -q -n 2 -m unit

check: .venv/dev  ## style, types, generated code against the protos, and the Kubernetes manifests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_house.py tests/k8s

bench: .venv/dev  ## quick benchmarks; results are kept in loadtest/LOG.md
	$(BIN)/python -m loadtest.fetch --quick
	$(BIN)/python -m loadtest.codecs --quick
	$(BIN)/python -m loadtest.build --quick
	$(BIN)/python -m loadtest.decode --quick
	$(BIN)/python -m loadtest.pace --quick

chaos: .venv/dev  ## faults under load, twelve minutes; prints what clients noticed of each
	$(BIN)/python -m tests.chaos

cases: .venv/dev  ## files and requests that users of similar projects reported, each with the right result
	$(BIN)/python -m tests.cases

fuzz: .venv/dev  ## a million nearly right inputs for every reader
	$(BIN)/python -m tests.fuzz

skew: .venv/dev  ## the last release, of tests/skew/RELEASE, against this tree: each part of one with all others of the other
	$(BIN)/python -m tests.skew

compose-test:  ## the system in containers, on one Redis and on a Cluster, up, again and down; prints what went wrong
	@$(PYTHON) -m tests.compose

science-check: .venv/dev  ## compression, probes and edits, measured from the committed checkpoints: ten minutes
	$(BIN)/python -m loadtest.science.check

science: .venv/dev  ## all tables and plots of SCIENCE.md, from committed checkpoints and curves: an hour
	$(BIN)/python -m loadtest.science

soak: .venv/dev  ## half an hour of mixed load, of which twenty minutes count; says what grows
	$(BIN)/python -m loadtest.soak

protos: .venv/dev  ## generate services/tolhouse/v1 from protos/
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=services --pyi_out=services --grpc_python_out=services protos/tolhouse/v1/*.proto

docs: .venv/docs/bin/mkdocs  ## build the documentation into dist/site; a broken link or reference fails the build
	@NO_MKDOCS_2_WARNING=1 .venv/docs/bin/mkdocs build --strict

wheel: .venv/tools/bin/twine  ## build the wheel and the sdist, check their metadata, and import the SDK from a bare install
	@rm -rf dist/*.whl dist/*.tar.gz .venv/bare
	@.venv/tools/bin/python -m build --outdir dist . >/dev/null
	@.venv/tools/bin/twine check --strict dist/*.whl dist/*.tar.gz
	@PYTHON=$(PYTHON) deploy/venv.sh .venv/bare
	@.venv/bare/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off -c constraints.txt dist/*.whl
	@cd / && $(CURDIR)/.venv/bare/bin/python -c "from tolhouse import Client; print(Client)"
	@ls dist/*.whl dist/*.tar.gz

audit: .venv/tools/bin/pip-audit  ## known vulnerabilities of the pinned packages; asks PyPI, or osv.dev with AUDIT_SERVICE=osv
	@deploy/audit.sh $<

sbom: .venv/tools/bin/pip-audit  ## dist/sbom.cdx.json: the pinned packages as a CycloneDX bill of materials
	@mkdir -p dist
	@.venv/tools/bin/cyclonedx-py requirements constraints.txt --pyproject pyproject.toml --output-reproducible --of JSON -o dist/sbom.cdx.json
	@echo dist/sbom.cdx.json

.venv/bin/python:
	@PYTHON=$(PYTHON) deploy/venv.sh .venv

# apart from what is tested: their own dependencies would be pinned with it
.venv/tools/bin/pip-audit: .venv/bin/python
	@PYTHON=$(PYTHON) deploy/venv.sh .venv/tools
	@.venv/tools/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off pip-audit==2.10.1 cyclonedx-bom==7.5.0

.venv/tools/bin/twine: .venv/bin/python
	@PYTHON=$(PYTHON) deploy/venv.sh .venv/tools
	@.venv/tools/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off build==1.6.1 twine==7.0.0

.venv/docs/bin/mkdocs: pyproject.toml constraints.txt .venv/bin/python
	@PYTHON=$(PYTHON) deploy/venv.sh .venv/docs
	@.venv/docs/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[docs]'
	@touch $@

.venv/all: .venv/bin/python pyproject.toml constraints.txt
	@echo "· installing into .venv" >&2
	@$(INSTALL) -e '.[all]'
	@touch $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt
	@echo "· installing into .venv" >&2
	@$(INSTALL) -e '.[dev]'
	@touch $@ .venv/all
