# `make demo` and `make test` need nothing but Python >= 3.10 and a package index; they make their own environment.
#   PYTHON  the interpreter (python3)          VENV  the environment (.venv)
#   TORCH   the PyTorch to install (torch==2.13.0): any requirement that pip understands, from version 2.10
#   ARGS    passed on to the demo, the tests or the benchmarks
#   OUT     folder of the benchmarks' JSON (benchmarks/results)
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
OUT ?= benchmarks/results
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The same versions as in .pre-commit-config.yaml: a formatter's output changes with its version.
LINTERS := ruff==0.17.5 clang-format==23.1.5 typos==1.52.0 mypy==2.4.1
NATIVE := setup.py pyproject.toml $(shell find csrc -type f)
CSRC := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
STAGE := build/stage

.PHONY: demo test lint typecheck bench gpu venv clean stage
.DELETE_ON_ERROR:

demo: $(STAMP)-train
	$(BIN)/python -m vjepa.demo $(ARGS)

test: $(STAMP)-test
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	$(BIN)/typos

# mypy cannot follow kernels/ -> vjepa.kernels in the sources, so it checks a staged copy of the package.
typecheck: $(STAMP)-test $(STAMP)-lint stage
	cd $(STAGE) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p vjepa

bench: $(STAMP)-test
	OUT=$(OUT) $(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

# On a machine that has PyTorch with CUDA and pytest already: no environment, no network. The package is staged with its
# native library and the working directory is the stage, so that `import vjepa` finds it there.
GPU_PYTEST := $(PYTHON) -m pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) -o addopts=--import-mode=importlib
gpu:
	@$(PYTHON) -c "import torch, sys; torch.cuda.is_available() or sys.exit('make gpu: PyTorch ' + torch.__version__ + ' finds no CUDA device')"
	@$(PYTHON) -c "import pytest, pytest_benchmark, setuptools" || { echo "make gpu: the packages above must be installed"; exit 1; }
	rm -rf $(STAGE)
	$(PYTHON) setup.py --quiet build --build-lib $(STAGE)
	cd $(STAGE) && $(GPU_PYTEST) -m gpu $(CURDIR)/tests $(ARGS)
	cd $(STAGE) && OUT=$(abspath $(OUT)) $(GPU_PYTEST) --benchmark-only $(CURDIR)/benchmarks

stage:
	rm -rf $(STAGE)
	mkdir -p $(STAGE)
	cp -r vjepa $(STAGE)/vjepa
	cp -r kernels $(STAGE)/vjepa/kernels

venv: $(STAMP)-test $(STAMP)-lint

$(STAMP)-venv:
	@$(PYTHON) -c "import sys; sys.exit(None if sys.version_info >= (3, 10) else 'vjepa needs Python 3.10 or newer, PYTHON=$(PYTHON) is ' + sys.version.split()[0])"
	$(PYTHON) -m venv $(VENV)
	@touch $@

# PyTorch first and pinned from then on: nothing that is installed later may replace it.
$(STAMP)-torch: | $(STAMP)-venv
	$(PIP) install $(TORCH)
	$(PIP) freeze | grep -i '^torch==' > $(VENV)/constraints.txt
	@touch $@

$(STAMP)-train: $(NATIVE) | $(STAMP)-torch
	$(PIP) install --constraint $(VENV)/constraints.txt --editable '.[train]'
	@touch $@

$(STAMP)-test: $(NATIVE) | $(STAMP)-torch
	$(PIP) install --constraint $(VENV)/constraints.txt --editable '.[train,test]'
	@touch $@ $(STAMP)-train

$(STAMP)-lint: Makefile | $(STAMP)-venv
	$(PIP) install $(LINTERS)
	@touch $@

clean:
	rm -rf build dist *.egg-info $(VENV) kernels/native.json kernels/libvjepa_native.* kernels/vjepa_native.dll
	rm -rf .pytest_cache .ruff_cache .mypy_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
