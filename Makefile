# `make demo` and `make test` need nothing but Python >= 3.10 and a package index; they make their own environment.
#   PYTHON  the interpreter (python3)          VENV  the environment (.venv)
#   TORCH   the PyTorch to install (torch==2.13.0): any requirement that pip understands, from version 2.10
#   ARGS    passed on to the demo, the tests or the benchmarks
#   OUT     folder of the benchmarks' JSON (benchmarks/results)
#   STAGE   of `make gpu`: test, tokens, attention, block, overhead, ema, step, growth or all (all)
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
OUT ?= benchmarks/results
STAGE ?= all
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PIP := $(BIN)/python -m pip --disable-pip-version-check
OLDER_TRITON := $(if $(filter Linux,$(shell uname -s)),$(STAMP)-triton-3.6.0)
# The same versions as in .pre-commit-config.yaml: a formatter's output changes with its version.
LINTERS := ruff==0.17.5 clang-format==23.1.5 typos==1.52.0 mypy==2.4.1
NATIVE := setup.py pyproject.toml $(shell find csrc -type f)
CSRC := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
STAGED := build/stage

.PHONY: demo test aot lint typecheck sanitize bench gpu gpu-test gpu-tokens gpu-attention gpu-block gpu-overhead gpu-ema gpu-step gpu-growth gpu-stage gpu-machine venv clean stage
.DELETE_ON_ERROR:

demo: $(STAMP)-train
	$(BIN)/python -m vjepa.demo $(ARGS)

# In three processes: the memory pool of PyTorch's MKL finds no end (mm_account_ptr_by_tid) once too many threads have come and
# gone in one, which tests with several numbers of threads make.
ALONE := tests/packaging tests/train
test: $(STAMP)-test $(OLDER_TRITON)
ifeq ($(strip $(ARGS)),)
	$(BIN)/python -m pytest $(ALONE:%=--ignore=%)
	for folder in $(ALONE); do $(BIN)/python -m pytest $$folder || exit 1; done
else
	$(BIN)/python -m pytest $(ARGS)
endif

# docs/ahead_of_time.md and docs/cuda_kernels.md: what the Triton and the CUDA C++ kernels become on every architecture; no
# GPU needed. Without nvcc the second stays as it is.
aot: $(STAMP)-test $(OLDER_TRITON)
	$(BIN)/python tests/kernels/ahead_of_time.py table
	$(BIN)/python tests/packaging/cuda_code.py table

lint: $(STAMP)-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	$(BIN)/typos

# mypy cannot follow kernels/ -> vjepa.kernels in the sources, so it checks a staged copy of the package.
typecheck: $(STAMP)-test $(STAMP)-lint stage
	cd $(STAGED) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p vjepa

bench: $(STAMP)-test
	OUT=$(OUT) $(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

# On a machine that has PyTorch with CUDA and pytest already: no environment, no network. The package is staged with its
# native library, and tests and benchmarks run from the stage, so that `import vjepa` finds it there. Each stage ends
# within 8 minutes, if need be by an interrupt; a benchmark's JSON is written as soon as it is measured.
GPU_STAGED := build/gpu
GPU_STAGES := test tokens attention block overhead ema step growth
gpu_pytest = cd $(GPU_STAGED) && PYTHONPATH=$(abspath $(GPU_STAGED)) OUT=$(abspath $(OUT)) \
	timeout --signal=INT --kill-after=20 $(1) $(PYTHON) -m pytest -q -ra --tb=short -c $(CURDIR)/pyproject.toml \
	--rootdir $(CURDIR) -o addopts=--import-mode=importlib -p no:cacheprovider $(2) $(ARGS)
# other tests than those of the kernels need packages that may be missing, so that their files are named
GPU_TESTS := $(filter-out tests/kernels/%,$(shell grep -rl --include='test_*.py' 'mark\.gpu' tests))

gpu: gpu-stage
	@failed=; for stage in $(if $(filter all,$(STAGE)),$(GPU_STAGES),$(STAGE)); do \
		$(MAKE) --no-print-directory gpu-$$stage || failed="$$failed $$stage"; \
	done; \
	$(PYTHON) benchmarks/report.py $(OUT) --kind cuda; \
	test -z "$$failed" || { echo "make gpu: failed:$$failed"; exit 1; }

gpu-test: gpu-stage
	( $(call gpu_pytest,380,--ignore=$(CURDIR)/tests/kernels/test_ahead_of_time.py $(CURDIR)/tests/kernels) ); kernels=$$?; \
	( $(call gpu_pytest,60,-m gpu $(addprefix $(CURDIR)/,$(GPU_TESTS))) ) && exit $$kernels

gpu-tokens: BENCHMARKS := tubelet gather predictor_tokens loss
gpu-attention: BENCHMARKS := attention
gpu-block: BENCHMARKS := norm mlp block
gpu-overhead: BENCHMARKS := overhead
gpu-ema: BENCHMARKS := ema gradient_norm optimizer
gpu-step: BENCHMARKS := step step_largest
gpu-growth: BENCHMARKS := step_growth
gpu-tokens gpu-attention gpu-block gpu-overhead gpu-ema gpu-step gpu-growth: gpu-stage
	$(call gpu_pytest,440,--benchmark-only $(BENCHMARKS:%=$(CURDIR)/benchmarks/bench_%.py))

gpu-stage: gpu-machine $(GPU_STAGED)/.stamp

gpu-machine:
	@$(PYTHON) -c "import torch, sys; torch.cuda.is_available() or sys.exit('make gpu: PyTorch ' + torch.__version__ + ' finds no CUDA device')"
	@$(PYTHON) -c "import pytest, pytest_benchmark, setuptools" || { echo "make gpu: the packages above must be installed"; exit 1; }

$(GPU_STAGED)/.stamp: $(NATIVE) $(shell find kernels vjepa -name '*.py')
	rm -rf $(GPU_STAGED)
	$(PYTHON) setup.py --quiet build --build-lib $(GPU_STAGED)
	@touch $@

# The native tests with a library that checks every access and every operation; GCC or Clang on Linux.
SANITIZED := build/sanitize
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g
SANITIZED_TESTS := $(wildcard $(CURDIR)/tests/packaging/test_native*.py) $(addprefix $(CURDIR)/tests/kernels/test_,cpu_tokens.py ema_kept.py optimizer_kept.py adamw_operator.py gradient_norm.py)
sanitizers = $(foreach name,libasan.so libubsan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(name)))

sanitize: $(STAMP)-test
	rm -rf $(SANITIZED)
	PATH="$(abspath $(BIN)):$$PATH" CXXFLAGS="$(SANITIZE)" VJEPA_CUDA_ARCHS=none $(BIN)/python setup.py --quiet build --build-lib $(SANITIZED)
	cd $(SANITIZED) && LD_PRELOAD="$(sanitizers)" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(abspath $(SANITIZED)) \
		$(abspath $(BIN))/python -m pytest -q -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) \
		-o addopts=--import-mode=importlib -p no:cacheprovider $(SANITIZED_TESTS)

stage:
	rm -rf $(STAGED)
	mkdir -p $(STAGED)
	cp -r vjepa $(STAGED)/vjepa
	cp -r kernels $(STAGED)/vjepa/kernels

venv: $(STAMP)-test $(OLDER_TRITON) $(STAMP)-lint

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

# The tests compile the Triton kernels with this Triton too; it lies in a folder of its own, where nothing else finds it.
$(STAMP)-triton-3.6.0: | $(STAMP)-venv
	$(PIP) install --no-deps --upgrade --target $(VENV)/triton-3.6.0 triton==3.6.0
	@touch $@

$(STAMP)-lint: Makefile | $(STAMP)-venv
	$(PIP) install $(LINTERS)
	@touch $@

clean:
	rm -rf build dist *.egg-info $(VENV) kernels/native.json kernels/libvjepa_native.* kernels/vjepa_native.dll
	rm -rf .pytest_cache .ruff_cache .mypy_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
