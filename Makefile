# Every target sets up what it needs. The environment is .venv here; tools that take long to build are
# kept in $SFTJOB_CACHE (~/.cache/sftjob), so that another checkout finds them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

export SFTJOB_CACHE ?= $(HOME)/.cache/sftjob
# Threads that wait sleep. Where cores are shared, threads that spin cost small models nearly all of their speed.
export OMP_WAIT_POLICY ?= PASSIVE
BIN := .venv/bin
INSTALLED := .venv/.installed
CHART_CRD := charts/sftjob-operator/files/sftjobs.sftjob.dev.yaml

help: ## Say what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(INSTALLED) ## Train a small model on this machine, in a minute or two, into runs/quickstart
	$(BIN)/python -m examples.quickstart.teach
	$(BIN)/sft run examples/quickstart.yaml
	$(BIN)/python -m examples.quickstart.score

test: $(INSTALLED) tools ## Run all tests
	@$(BIN)/python -m pytest

check: $(INSTALLED) ## Formatting, lint, types, import contracts, generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m sft_api.crd --check
	$(BIN)/python -m sft_api.crd --check $(CHART_CRD)
	$(BIN)/python -m sft_api.reference --check

generate: $(INSTALLED) ## Write the files that are generated: crds/, the chart's copy, and docs/api.md
	$(BIN)/python -m sft_api.crd
	$(BIN)/python -m sft_api.crd $(CHART_CRD)
	$(BIN)/python -m sft_api.reference

images: ## Build the images of the operator and the trainer into build/images (IMAGES=operator builds one)
	@scripts/images.sh $(IMAGES)

constraints: $(INSTALLED) ## Pin the dependencies of pyproject.toml anew (keeps the pins that still fit)
	@scripts/pin.sh

cluster: $(INSTALLED) tools ## Bring up a Kubernetes of two nodes on this machine, in .cluster
	@$(BIN)/python -m tests.cluster up

cluster-down: $(INSTALLED) ## Take it down, without a trace
	@$(BIN)/python -m tests.cluster down

tools: $(INSTALLED) ## Install what only tests need: what the test cluster is made of, an S3 server, a browser
	@scripts/tools.sh

venv: $(INSTALLED) ## Make .venv with everything pinned in constraints.txt

clean: ## Remove the environment, the caches and runs/quickstart
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist runs/quickstart
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): constraints.txt pyproject.toml scripts/setup.sh
	@scripts/setup.sh

.PHONY: help quickstart test check generate images constraints cluster cluster-down tools venv clean
