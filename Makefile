# The manual of this repository: `make help` lists what it can do.
# Two commands do all the set-up: `make demo` and `make test`.
# Everything they create stays in this checkout, in .venv and .cache.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
STRESS_ARGS ?=
MUTATION_ARGS ?=
# From 0.17 on megatron-core wants Python 3.12; its tests run there too if this machine has one.
MEGATRON_PYTHON ?= $(shell for p in python3.12 python3.13 $$(ls -d "$$(dirname "$$(dirname "$$(command -v pyenv || echo /-/-/-)")")"/versions/3.12*/bin/python3.12 2>/dev/null); do "$$p" -c 'import ensurepip, venv' 2>/dev/null && echo "$$p" && break; done)
BENCH_PATH ?= .cache/bench

BIN := $(CURDIR)/.venv/bin
STAMP := .venv/.installed
MEGATRON_STAMP := .venv-megatron/.installed
MEGATRON_017 := .cache/megatron-0.17

export PATH := $(BIN):$(PATH)
export XDG_CACHE_HOME := $(CURDIR)/.cache
export XDG_STATE_HOME := $(CURDIR)/.cache/state
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.cache/torch_extensions
export TRITON_CACHE_DIR := $(CURDIR)/.cache/triton
export HYPOTHESIS_STORAGE_DIRECTORY := $(CURDIR)/.cache/hypothesis
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1

# No CUDA driver on this machine: tell DeepSpeed, or it searches and warns on every start.
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
export DS_ACCELERATOR ?= cpu
endif
# A job runner may give no home directory; nothing may be written to a folder named "~" then.
ifeq ($(HOME),)
export HOME := $(CURDIR)/.cache/home
endif

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-faults soak stress mutations megatron lint type format docs bench clean compiler

help: ## Print this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "  variables: PYTHON=$(PYTHON) TORCH=$(TORCH) PYTEST_ARGS=$(PYTEST_ARGS)"

install: $(STAMP) ## Create .venv with torch, DeepSpeed, megatron-core, the plugin and the developer's tools.

# torch goes first and alone: DeepSpeed's build looks at the torch that is there.
$(STAMP): setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { echo 'error: `$(PYTHON)` is not Python 3.10 to 3.13; run `make PYTHON=/path/to/python3 $(MAKECMDGOALS)`' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo 'error: `$(PYTHON)` cannot create environments; install its venv module (Debian: apt-get install python3-venv)' >&2; exit 1; }
	@mkdir -p .cache
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo 'installing $(TORCH) (once; minutes, mostly the download) ...'
	@$(BIN)/python -m pip install --quiet '$(TORCH)'
	@echo 'installing the plugin, DeepSpeed, megatron-core and the tools ...'
	@$(BIN)/python -m pip install --quiet --editable '.[deepspeed,megatron,dev]'
	@touch $@

# On CPU DeepSpeed compiles one operator at its first start (about 40 s, cached afterwards).
compiler:
	@command -v g++ >/dev/null || { echo 'error: g++ is missing and DeepSpeed compiles an operator with it (Debian: apt-get install g++)' >&2; exit 1; }

demo: export OMP_NUM_THREADS ?= 1
demo: compiler $(STAMP) ## Train a small GPT twice, with and without the plugin, and compare (the main job).
	@$(BIN)/python launch/demo.py

# Newer releases of megatron-core than this Python can have: the newest, and one whose scripts are written the old way.
$(MEGATRON_STAMP): setup.py
	@mkdir -p .cache
	@test -x .venv-megatron/bin/python || $(MEGATRON_PYTHON) -m venv .venv-megatron
	@echo 'installing the newest megatron-core for Python 3.12 (once; its torch may bring CUDA, some gigabytes) ...'
	@.venv-megatron/bin/python -m pip install --quiet '$(TORCH)'
	@.venv-megatron/bin/python -m pip install --quiet --editable '.[megatron]'
	@.venv-megatron/bin/python -m pip install --quiet --no-deps --target $(MEGATRON_017) --upgrade 'megatron-core==0.17.1'
	@touch $@

megatron: $(if $(MEGATRON_PYTHON),$(MEGATRON_STAMP)) ## Create .venv-megatron with the newest megatron-core, if there is a Python 3.12.
	@$(if $(MEGATRON_PYTHON),,echo 'no Python 3.12 here: the tests of the newest megatron-core will be skipped')

test test-all: export SSDTRAIN_MEGATRON_PYTHON ?= $(if $(MEGATRON_PYTHON),$(CURDIR)/.venv-megatron/bin/python)
test test-all: export SSDTRAIN_MEGATRON_017 ?= $(if $(MEGATRON_PYTHON),$(CURDIR)/$(MEGATRON_017))
test: compiler lint type megatron ## Lint, types and the tests, in random order (what CI runs).
	@$(BIN)/python tools/build_aio.py
	@$(BIN)/python -m pytest -p randomly $(PYTEST_ARGS)

test-all: export SSDTRAIN_KILLS ?= 20
test-all: export SSDTRAIN_PRETRAIN_STEPS ?= 20
test-all: override PYTEST_ARGS += -m ""
test-all: test ## The same with every combination of parameters, and full counts (an hour).

test-faults: compiler $(STAMP) ## Run every fault under every host, write the table of docs/operations.md (ten minutes).
	@$(BIN)/python tools/fault_table.py

soak: compiler $(STAMP) ## Train 2,000 steps under faults at random: equal to the last bit, nothing grows (ten minutes).
	@$(BIN)/python tools/soak.py

stress: $(STAMP) ## Run 10,000 seeded runs of the race suite on all cores (STRESS_ARGS="--count 500 --first 0").
	@$(BIN)/python tools/stress.py $(STRESS_ARGS)

mutations: $(STAMP) ## Take each guard out of a copy of the core and see that the race suite notices (half an hour).
	@$(BIN)/python tools/mutations.py $(MUTATION_ARGS)

lint: $(STAMP) ## Check style and format.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

type: $(STAMP) ## Check types (mypy strict on the package).
	@$(BIN)/mypy

format: $(STAMP) ## Rewrite the sources in the project's format.
	@$(BIN)/ruff check --fix-only --exit-zero .
	@$(BIN)/ruff format .

docs: $(STAMP) ## Write the option table of the user guide again from the config.
	@$(BIN)/python tools/option_table.py

bench: $(STAMP) ## Measure hooks, engines, a training step, the policies and the peers, on BENCH_PATH (an hour).
	@mkdir -p $(BENCH_PATH)
	@$(BIN)/ssdtrain bench hooks
	@$(BIN)/ssdtrain bench io $(BENCH_PATH)
	@$(BIN)/ssdtrain bench step $(BENCH_PATH)
	@$(BIN)/ssdtrain bench adapt $(BENCH_PATH) --output $(BENCH_PATH)
	@$(BIN)/ssdtrain bench rok $(BENCH_PATH) --quick --output $(BENCH_PATH)
	@$(BIN)/ssdtrain bench scale $(BENCH_PATH) --output $(BENCH_PATH)

clean: ## Remove the environment, the caches and built files.
	@rm -rf .venv .venv-megatron .cache .hypothesis build dist *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
