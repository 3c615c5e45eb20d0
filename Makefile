# Every target installs what it needs into .venv.
.DEFAULT_GOAL := help
.PHONY: help setup demo serve test test-fast check bench cases chaos clients fuzz skew vllm-test vllm-bench compose-test science-check science related-check soak pictures protos docs wheel audit sbom
SHELL := /bin/bash

# allocator settings of the images; deploy/Dockerfile has the reasons
export MALLOC_ARENA_MAX := 2
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 268435456

PYTHON := $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -c constraints.txt

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 15

setup: .venv/dev  ## install everything for development into .venv

demo: .venv/all  ## build the demo model's table, serve it, complete three prompts over HTTP, stop
	@$(BIN)/tolhouse demo

serve: .venv/all  ## run the same system until Ctrl-C
	@$(BIN)/tolhouse serve

test: .venv/dev  ## run all tests, three files at a time
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

test-fast: .venv/dev  ## run the unit tests, within 90 seconds
	$(BIN)/python -m pytest -q -n 2 -m unit

check: .venv/dev  ## check style, types, generated code, and the Kubernetes manifests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_house.py tests/k8s

bench: .venv/dev  ## run quick benchmarks; loadtest/LOG.md has recorded results
	$(BIN)/python -m loadtest.fetch --quick
	$(BIN)/python -m loadtest.codecs --quick
	$(BIN)/python -m loadtest.build --quick
	$(BIN)/python -m loadtest.decode --quick
	$(BIN)/python -m loadtest.pace --quick

chaos: .venv/dev  ## inject faults under load (twelve minutes) and check the responses
	$(BIN)/python -m tests.chaos

cases: .venv/dev  ## check files and requests that users of similar projects reported
	$(BIN)/python -m tests.cases

fuzz: .venv/dev  ## feed a million malformed inputs to the readers
	$(BIN)/python -m tests.fuzz

skew: .venv/dev  ## test each part of the last release (tests/skew/RELEASE) with this tree, and the reverse
	$(BIN)/python -m tests.skew

clients: .venv/all .venv/clients/installed  ## test third-party clients, such as openai, LangChain and lm-eval, against a running system
	@tests/clients/node/install.sh || echo "· Node can't be installed: its clients are skipped" >&2
	$(BIN)/python -m tests.clients

vllm-test: .venv/vllm/installed  ## test the plug-in in vLLM on this CPU (half an hour, and 3 GB for .venv/vllm)
	.venv/vllm/bin/python -m pytest -q -o filterwarnings=ignore -o timeout=1200 tests/vllm

vllm-bench: .venv/all .venv/vllm/installed  ## compare vLLM with rows from Tolhouse, vLLM with a dense model, and a worker (half an hour)
	.venv/vllm/bin/python -m loadtest.vllm

compose-test:  ## test the system in containers, on one Redis and on a Redis Cluster
	@$(PYTHON) -m tests.compose

science-check: .venv/dev  ## measure compression, probes and edits of the committed checkpoints (ten minutes)
	$(BIN)/python -m loadtest.science.check

science: .venv/dev  ## compute all tables and plots of SCIENCE.md (one hour)
	$(BIN)/python -m loadtest.science

related-check: .venv/dev  ## check and measure the parts from related papers (ten minutes)
	$(BIN)/python -m loadtest.related

soak: .venv/dev  ## run half an hour of mixed load and test whether anything grows
	$(BIN)/python -m loadtest.soak

pictures: .venv/dev  ## take the screenshots of the explorer page in docs/images
	$(BIN)/python -m tests.pictures

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

audit: .venv/tools/bin/pip-audit  ## list known vulnerabilities of the pinned packages, from PyPI, or osv.dev with AUDIT_SERVICE=osv
	@deploy/audit.sh $<

sbom: .venv/tools/bin/pip-audit  ## write dist/sbom.cdx.json, a CycloneDX bill of materials of the pinned packages
	@mkdir -p dist
	@.venv/tools/bin/cyclonedx-py requirements constraints.txt --pyproject pyproject.toml --output-reproducible --of JSON -o dist/sbom.cdx.json
	@echo dist/sbom.cdx.json

.venv/bin/python:
	@PYTHON=$(PYTHON) deploy/venv.sh .venv

# separate from .venv, because these tools have dependencies of their own
.venv/tools/bin/pip-audit: .venv/bin/python
	@PYTHON=$(PYTHON) deploy/venv.sh .venv/tools
	@.venv/tools/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off pip-audit==2.10.1 cyclonedx-bom==7.5.0

.venv/tools/bin/twine: .venv/bin/python
	@PYTHON=$(PYTHON) deploy/venv.sh .venv/tools
	@.venv/tools/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off build==1.6.1 twine==7.0.0

# apart from Tolhouse, whose dependencies differ; the file pins every package
.venv/clients/installed: tests/clients/python/requirements.txt .venv/bin/python
	@echo "· installing third-party clients into .venv/clients" >&2
	@PYTHON=$(PYTHON) deploy/venv.sh .venv/clients
	@.venv/clients/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off --no-deps --no-compile -r $<
	@touch $@

# apart from Tolhouse, because vLLM pins torch; the file has every package
.venv/vllm/installed: tests/vllm/constraints.txt .venv/bin/python
	@echo "· installing vLLM into .venv/vllm" >&2
	@PYTHON=$(PYTHON) deploy/venv.sh .venv/vllm
	@.venv/vllm/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off --no-deps --no-compile -r $< -e .
	@touch $@

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
