# make demo | test | lint | bench | gpu-test | soak | wheel | readme | clean
#
# Needs python3 >= 3.11 (with its headers), a C++20 compiler and make. Everything else comes into
# the virtual environment .venv from the package index.
#
#   PYTHON=python3.12    which interpreter
#   CUDA=auto            auto: nvcc on PATH (or $CUDA_HOME) if there is one; wheels: nvcc from the
#                        package index; off: CPU only
#   JAX_EXTRA=cuda13     jax's GPU plugin, on a machine with a GPU (empty: none; cuda12: older drivers)
#   NO_VENV=1            use PYTHON and its packages as they are, offline: build in place and install
#                        nothing
#   JOBS=2 WORKERS=2     compiler processes; test processes
#   ARGS=...             passed on to pytest, the demo or the benchmark

PYTHON ?= python3
VENV ?= .venv
CUDA ?= auto
NO_VENV ?=
JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
WORKERS ?= 2
ARGS ?=

HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
JAX_EXTRA ?= $(if $(HAS_GPU),cuda13)
comma := ,

CMAKE_OPTIONS_auto :=
CMAKE_OPTIONS_off := -DJAX_FLASH_CUDA=OFF
CMAKE_OPTIONS_wheels := -DJAX_FLASH_NVCC_FROM_WHEELS=ON
CMAKE_OPTIONS := $(CMAKE_OPTIONS_$(CUDA))
ifeq ($(filter auto off wheels,$(CUDA)),)
$(error CUDA=$(CUDA): expected auto, off or wheels)
endif

SOURCES := pyproject.toml CMakeLists.txt $(wildcard cmake/*) $(shell find csrc -type f)
ifeq ($(NO_VENV),)
PY := $(VENV)/bin/python
READY := $(VENV)/.installed-$(CUDA)
LINT_READY := $(VENV)/.lint
CLANG_FORMAT := $(VENV)/bin/clang-format
else
PY := $(PYTHON)
READY := build/inplace/.installed-$(CUDA)
LINT_READY :=
CLANG_FORMAT := clang-format
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
endif
CMAKE = $(shell $(PY) -m cmake --version >/dev/null 2>&1 && echo $(PY) -m cmake || echo cmake)
# A dependency group of pyproject.toml, one requirement a word.
group = $(shell $(PYTHON) -c "import tomllib; \
  print(*(f'\"{r}\"' for r in tomllib.load(open('pyproject.toml', 'rb'))$(1)))")
BUILD_GROUP = $(call group,['build-system']['requires']) $(call group,['dependency-groups']['build'])
LINT_GROUP = $(call group,['dependency-groups']['lint'])
NVCC_GROUP = $(call group,['dependency-groups']['nvcc'])

.PHONY: help probe build demo test lint format bench gpu-test soak readme wheel clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

build: $(READY)

demo: $(READY)
	$(PY) examples/train_gpt.py $(ARGS)

test: $(READY)
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(PY) -m pytest -n $(WORKERS) $(ARGS)

lint: $(LINT_READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	find csrc -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' | \
	  xargs $(CLANG_FORMAT) --dry-run --Werror

format: $(LINT_READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	find csrc -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' | xargs $(CLANG_FORMAT) -i

bench: $(READY)
	$(PY) -m benchmarks.run $(ARGS)

gpu-test: $(READY)
	$(PY) -m tests.run_gpu $(ARGS)

soak: $(READY)
	$(PY) -m tests.soak $(ARGS)

readme: $(READY)
	$(PY) -m benchmarks.readme
	$(PY) -m benchmarks.plot

wheel: $(VENV)/.tools
	$(PY) -m pip wheel --no-deps --no-build-isolation -w dist $(PIP_CMAKE) .

clean:
	rm -rf build dist $(VENV) .pytest_cache .ruff_cache .hypothesis
	find jax_flash -name '*.so' -delete

# ---- environment and build

probe:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "jax_flash needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c "import os, sys, sysconfig; \
	  sys.exit(not os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h')))" || \
	  { echo "Python.h is missing: install Python's headers (Debian, Ubuntu: python3-dev)" >&2; exit 1; }

$(VENV)/bin/python: | probe
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "python3 -m venv failed: install it (Debian, Ubuntu: python3-venv) or use NO_VENV=1" >&2; \
	  exit 1; }

$(VENV)/.lint: pyproject.toml | $(VENV)/bin/python
	$(PY) -m pip install -q $(LINT_GROUP)
	@touch $@

$(VENV)/.tools: pyproject.toml | $(VENV)/bin/python
	$(PY) -m pip install -q $(BUILD_GROUP)
	@touch $@

$(VENV)/.nvcc: pyproject.toml | $(VENV)/bin/python
	$(PY) -m pip install -q $(NVCC_GROUP)
	@touch $@

# Editable: Python files are used from this tree, only a change of C++ or CUDA builds again.
PIP_CMAKE = $(foreach option,$(CMAKE_OPTIONS),-C cmake.args=$(option))
$(VENV)/.installed-$(CUDA): $(VENV)/.tools $(if $(filter wheels,$(CUDA)),$(VENV)/.nvcc) $(SOURCES)
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(PY) -m pip install -q --no-build-isolation $(PIP_CMAKE) \
	  -e ".[test,examples,bench$(if $(JAX_EXTRA),$(comma)$(JAX_EXTRA))]"
	@rm -f $(VENV)/.installed-*
	@touch $@

build/inplace/.installed-$(CUDA): $(SOURCES) | probe
	$(CMAKE) -S . -B build/inplace -DPython_EXECUTABLE="$$($(PYTHON) -c 'import sys; print(sys.executable)')" \
	  $(CMAKE_OPTIONS)
	$(CMAKE) --build build/inplace -j $(JOBS)
	$(CMAKE) --install build/inplace --prefix .
	@rm -f build/inplace/.installed-*
	@touch $@
