# A fresh clone needs Python >= 3.11 and a C++17 compiler, nothing else:
#   make demo     meta-train on sinusoids and plot what was learned (about a minute)
#   make test     the test suite; MTML_CPU_ISA=avx2 (or base) runs it on another instruction set
#   make test-slow   what `make test` leaves out: heavy sweeps, measurements of memory, the engine under sanitizers
# Both make their own environment in .venv, build the package into it (editable), and do so again only when the sources
# of the build have changed. CONTRIBUTING.md lists the variables below.
PYTHON ?= python3
VENV ?= .venv
TORCH_INSTALL ?=
PYTEST_WORKERS ?= auto
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
export TORCH_INSTALL
# The environment alone decides what is imported.
unexport PYTHONPATH

BIN := $(abspath $(VENV))/bin
CLANG_FORMAT = find csrc tests/cuda -regex '.*\.\(cpp\|h\|inl\|cu\|cuh\)' -print0 | PATH="$(BIN):$$PATH" xargs -0 clang-format
ENVIRONMENT := $(VENV)/.mtml-environment
PEERS := $(VENV)/.mtml-peers
DOCS := $(VENV)/.mtml-docs
BUILT := $(VENV)/.mtml-built
# Folders are listed too: their times change when a file is deleted.
BUILD_SOURCES := setup.py pyproject.toml $(shell find build_support -name '*.py') $(shell find csrc)
SHAPING := CXX CPPFLAGS CXXFLAGS LDFLAGS MTML_CUDA CUDA_HOME CUDA_PATH NVCC_PREPEND_FLAGS NVCC_APPEND_FLAGS \
    MTML_CUDA_ARCHS TORCH_CUDA_ARCH_LIST CUDAARCHS
BUILD_VARIABLES := $(foreach name,$(SHAPING),$(name)=$($(name)))

# CUDA code for the GPUs of this machine; where there is none, for one architecture, which shows that it compiles: the
# default list of setup.py is for packages, and compiles every kernel eight times. A list of your own stays.
ifeq ($(MTML_CUDA_ARCHS)$(TORCH_CUDA_ARCH_LIST)$(CUDAARCHS),)
$(VENV)/.mtml-built: export MTML_CUDA_ARCHS = $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo native || echo 90)
endif

.PHONY: help demo test test-slow lint format docs bench doctor build clean distclean FORCE
.DELETE_ON_ERROR:

help:
	@echo "make demo | test | test-slow | lint | format | docs | bench | doctor | build | clean | distclean"

demo: $(BUILT)
	$(BIN)/mtml train sinusoid --demo $(DEMO_ARGS)

# From another folder and without it on the path (-P), so that the tests meet the installed package, not the source tree.
PYTEST = cd $(VENV) && $(BIN)/python -P -m pytest "$(CURDIR)/tests" -n $(PYTEST_WORKERS) --dist worksteal

test: $(BUILT)
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: $(BUILT)
	$(PYTEST) -m slow $(PYTEST_ARGS)

lint: $(BUILT)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(CLANG_FORMAT) --dry-run -Werror

format: $(ENVIRONMENT)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .
	$(CLANG_FORMAT) -i

# Reads the sources, so nothing is built for it; a warning is an error.
docs: $(DOCS)
	$(BIN)/python -m mkdocs build --quiet
	@echo "build/docs/index.html"

bench: $(BUILT) $(PEERS)
	$(BIN)/python -m bench run $(BENCH_ARGS)

doctor: $(BUILT)
	$(BIN)/mtml doctor

build: $(BUILT)

$(ENVIRONMENT): pyproject.toml constraints-dev.txt .ci/devenv.py
	$(PYTHON) .ci/devenv.py $(VENV)
	@touch $@

# What the benchmarks compare with and nothing else needs.
$(PEERS): $(ENVIRONMENT)
	$(PYTHON) .ci/devenv.py $(VENV) --extras peers
	@touch $@

# What makes the pages of docs/.
$(DOCS): $(ENVIRONMENT)
	$(PYTHON) .ci/devenv.py $(VENV) --extras docs
	@touch $@

$(BUILT): $(ENVIRONMENT) $(BUILD_SOURCES) build/variables
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# Rewritten only when a variable that shapes the build has another value than last time.
build/variables: FORCE
	@mkdir -p build
	@echo '$(BUILD_VARIABLES)' | cmp -s - $@ || echo '$(BUILD_VARIABLES)' > $@

clean:
	rm -rf build dist *.egg-info python/*.egg-info mtml_kernels/_C*.so mtml_kernels/_build.json $(BUILT)
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
