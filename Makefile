# Set-up, checks and packaging. Everything lives in .venv and build/; `make help` lists the targets.
#   PYTHON=python3.12     the interpreter that .venv is made with (3.10 or newer)
#   PIP_ARGS="..."        options for every pip call: a mirror, or a CPU build of torch with
#                         PIP_ARGS="--extra-index-url <index with CPU wheels>"
#   CUDA_ARCHITECTURES="80-real;90"  GPUs that the CUDA kernels are compiled for, where nvcc is
#                         found; the card of this machine where there is one. `make wheel-cuda` takes
#                         the whole list of CMakeLists.txt. After a change: make -B setup.
#   SECONDS=60            that each fuzzer of `make fuzz` runs
PYTHON ?= python3
PIP_ARGS ?=
CUDA_ARCHITECTURES ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader \
  2> /dev/null | grep -E '^[0-9]+\.[0-9]+$$' | tr -d . | sort -un | paste -sd ';'),80-real;90)
SECONDS ?= 60

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEPENDENCIES := $(VENV)/.dependencies-stamp
INSTALLED := $(VENV)/.installed-stamp
TENSORRT := $(VENV)/.tensorrt-stamp
RELEASE := dist/release
VERSION = $(shell sed -nE 's/^__version__ = "(.*)"/\1/p' exporter/vssm/_version.py)
AARCH64_CXX := aarch64-linux-gnu-g++
AARCH64 := $(addprefix --config-settings=cmake.define.,VSSM_CUDA=OFF CMAKE_SYSTEM_NAME=Linux \
  CMAKE_SYSTEM_PROCESSOR=aarch64 CMAKE_CXX_COMPILER=$(AARCH64_CXX))
AARCH64_LIBRARIES := --ldpaths /usr/aarch64-linux-gnu/lib
TENSORRT_WHEELS := $(addprefix tests/tensorrt_harness/wheels/,rtx.txt tools.txt lean-10.txt lean-11.txt)
SETUP_LOG := build/setup.log
# A process a core; each has whole files, so that what a file's tests share is made once. Bytecode is
# kept, also where the environment says otherwise: many tests begin processes that import everything.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

CXX_FILES := $(shell find plugins benchmarks examples -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
CXX_TESTS := $(shell find tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')
CMAKE_FILES := CMakeLists.txt $(shell find plugins benchmarks examples -name CMakeLists.txt -o -name '*.cmake')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup demo docs test test-all fuzz lint format wheel wheel-cuda release cuda-all cuda-report clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(INSTALLED) ## .venv with the pinned packages, the native library and the vssm command
	@echo "setup: ready; $(BIN)/vssm doctor says what was found"

demo: setup ## prune, export, prove and measure a model; ends with the path of a report
	@echo "demo: examples/demo.py, results in demo/"
	@$(BIN)/python examples/demo.py -o demo

docs: setup ## the documentation as a site in build/site; a broken link is an error
	@echo "docs: mkdocs"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "docs: build/site/index.html; to read it: $(BIN)/python -m http.server -d build/site"

test: setup $(TENSORRT) lint ## lint, then the tests; needs no GPU
	@echo "test: pytest"
	@$(PYTEST)

test-all: setup $(TENSORRT) lint ## the same with the tests that take long
	@echo "test-all: pytest with the slow tests"
	@$(PYTEST) --slow

fuzz: setup ## SECONDS=60 of every fuzzer: operators under sanitizers, readers of files
	@echo "fuzz: $(SECONDS) s each, in build/fuzz; the first build takes minutes"
	@$(BIN)/python tests/support/fuzzers.py --seconds $(SECONDS)

lint: $(DEPENDENCIES) ## ruff, mypy --strict, import-linter, clang-format, gersemi, typos; changes nothing
	@echo "lint: ruff check"
	@$(BIN)/ruff check .
	@echo "lint: ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "lint: mypy --strict"
	@$(BIN)/mypy --strict
	@echo "lint: import-linter"
	@mkdir -p build && PYTHONPATH=exporter $(BIN)/lint-imports --no-logo > build/lint-imports.log 2>&1 || { cat build/lint-imports.log; exit 1; }
	@echo "lint: clang-format"
	@$(BIN)/clang-format --dry-run -Werror $(CXX_FILES) $(CXX_TESTS)
	@echo "lint: gersemi"
	@$(BIN)/gersemi --check $(CMAKE_FILES) tests/tensorrt_harness tests/fuzz/operators
	@echo "lint: typos"
	@$(BIN)/typos

format: $(DEPENDENCIES) ## let the formatters rewrite the files
	@echo "format: ruff, clang-format, gersemi"
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CXX_FILES) $(CXX_TESTS)
	@$(BIN)/gersemi --in-place $(CMAKE_FILES) tests/tensorrt_harness tests/fuzz/operators

# The wheel is built from the source distribution alone. auditwheel reads from its libraries how old
# a system may be, and names it after that. All times in the archives are that of the last commit,
# and all modes those of umask 022, so that the same checkout gives the same bytes.
wheel wheel-cuda release: export SOURCE_DATE_EPOCH ?= $(or \
  $(shell git log -1 --format=%ct 2> /dev/null),1767225600)

wheel: $(DEPENDENCIES) ## source distribution and wheel with CPU kernels in dist/; needs no nvcc
	$(call build_wheel,dist,OFF)

wheel-cuda: $(DEPENDENCIES) ## wheel with CUDA kernels and TensorRT plugins in dist/cuda/; needs nvcc
	$(call build_wheel,dist/cuda,ON)

define build_wheel
	@echo "wheel: building into $(1)/ (log: build/wheel.log)"
	@rm -rf build/wheel $(1)/*.whl $(1)/*.tar.gz && mkdir -p build/wheel $(1)
	@umask 022 && $(BIN)/python -m build --no-isolation --outdir build/wheel \
	  -Ccmake.define.VSSM_CUDA=$(2) > build/wheel.log 2>&1 || { cat build/wheel.log; exit 1; }
	@$(BIN)/auditwheel show build/wheel/*.whl
	@umask 022 && PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir $(1) build/wheel/*.whl
	@mv build/wheel/*.tar.gz $(1) && ls -l $(1)
endef

release: $(DEPENDENCIES) ## dist/release/: source, wheels for x86-64 and aarch64, SBOM, checksums
	@rm -rf $(RELEASE) build/release && mkdir -p build/release
	$(call build_wheel,$(RELEASE),OFF)
	@umask 022 && if command -v $(AARCH64_CXX) > /dev/null; then \
	  echo "release: cross-compiling for aarch64 (log: build/release/aarch64.log)"; \
	  _PYTHON_HOST_PLATFORM=linux-aarch64 $(PIP) wheel --no-cache-dir --no-deps --no-build-isolation \
	    --wheel-dir build/release $(AARCH64) $(RELEASE)/*.tar.gz > build/release/aarch64.log 2>&1 || { \
	    cat build/release/aarch64.log; exit 1; }; \
	  $(BIN)/python -m auditwheel repair $(AARCH64_LIBRARIES) --wheel-dir $(RELEASE) build/release/*.whl; \
	else \
	  echo "release: left out: the wheel for aarch64; it takes $(AARCH64_CXX) (Debian: g++-aarch64-linux-gnu)"; \
	fi
	@echo "release: what pip installs with it, for the SBOM"
	@$(BIN)/python -m venv --without-pip build/release/venv
	@$(PIP) --python build/release/venv/bin/python install $(PIP_ARGS) --quiet \
	  --constraint constraints.txt $(RELEASE)/*_x86_64.whl
	@sed 's/^dynamic = .*/version = "$(VERSION)"/' pyproject.toml > build/release/pyproject.toml
	@$(BIN)/python -m cyclonedx_py environment --output-reproducible --mc-type library \
	  --pyproject build/release/pyproject.toml --output-file $(RELEASE)/vssm-$(VERSION).cdx.json \
	  build/release/venv/bin/python
	@$(BIN)/python -m twine check --strict $(RELEASE)/*.whl $(RELEASE)/*.tar.gz
	@cd $(RELEASE) && sha256sum -- * > ../SHA256SUMS && mv ../SHA256SUMS . && cat SHA256SUMS

cuda-all: $(DEPENDENCIES) ## compile the CUDA kernels for every architecture of the list
	@echo "cuda-all: compiling into build/cuda-all"
	@$(BIN)/cmake -S . -B build/cuda-all -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DVSSM_CUDA=ON > /dev/null
	@$(BIN)/cmake --build build/cuda-all --target vssm_cuda

cuda-report: $(DEPENDENCIES) ## registers, spills and shared memory of every CUDA kernel
	@$(BIN)/python benchmarks/cuda_report.py

clean: ## remove what was built and cached; .venv stays (rm -r .venv for a new one)
	@echo "clean: build/, dist/, demo/ and caches"
	@rm -rf build dist demo .mypy_cache .ruff_cache .hypothesis
	@find exporter examples tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEPENDENCIES): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "setup: PYTHON=$(PYTHON) is missing or older than 3.10; pass another with PYTHON="; exit 1; }
	@test -x $(BIN)/python || { echo "setup: creating $(VENV)"; $(PYTHON) -m venv $(VENV); } || { \
	  rm -rf $(VENV); echo "setup: no venv module; install it (Debian: python3-venv)"; exit 1; }
	@echo "setup: installing the pinned packages into $(VENV)"
	@$(PIP) install $(PIP_ARGS) --requirement constraints.txt
	@touch $@

# The build sees the pinned packages only (no isolation), so pip never resolves another torch.
$(INSTALLED): $(DEPENDENCIES) pyproject.toml $(wildcard examples/serving/* examples/web/*) exporter/vssm/_version.py $(CXX_FILES) $(CMAKE_FILES)
	@command -v $${CXX:-c++} > /dev/null || { \
	  echo "setup: no C++ compiler; install one (Debian: g++) or name it with CXX="; exit 1; }
	@echo "setup: building the native library and installing the package (log: $(SETUP_LOG))"
	@mkdir -p $(dir $(SETUP_LOG))
	@$(PIP) install $(PIP_ARGS) --verbose --constraint constraints.txt --no-build-isolation \
	  --config-settings=cmake.define.VSSM_CUDA_ARCHITECTURES="$(CUDA_ARCHITECTURES)" \
	  --config-settings=cmake.define.VSSM_EMULATION=ON \
	  --editable '.[dev]' > $(SETUP_LOG) 2>&1 || { cat $(SETUP_LOG); exit 1; }
	@sed -nE 's/^ *-- (vssm[^:]*: )/setup: \1/p' $(SETUP_LOG)
	@touch $@

# 186 MB to download, 445 MB on the disk, for tests alone. Two lean runtimes need a folder each.
$(TENSORRT): $(DEPENDENCIES) $(TENSORRT_WHEELS)
	@echo "test: installing TensorRT for RTX and two lean runtimes into $(VENV), for tests"
	@rm -rf $(VENV)/tensorrt
	@{ $(PIP) install $(PIP_ARGS) --quiet --no-deps --no-build-isolation \
	    --requirement tests/tensorrt_harness/wheels/rtx.txt \
	    --requirement tests/tensorrt_harness/wheels/tools.txt && \
	  $(PIP) install $(PIP_ARGS) --quiet --no-deps --target $(VENV)/tensorrt/lean-10 \
	    --requirement tests/tensorrt_harness/wheels/lean-10.txt && \
	  $(PIP) install $(PIP_ARGS) --quiet --no-deps --target $(VENV)/tensorrt/lean-11 \
	    --requirement tests/tensorrt_harness/wheels/lean-11.txt && touch $@; } || \
	  echo "test: left out: TensorRT's wheels (pip says why above); the tests with them are skipped"
