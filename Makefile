# `make train` and `make test` do all their own set-up; a second run installs nothing.
#   ARGS="..."           passed on: make train ARGS="model=small trainer.max_steps=200"
#   NPROC=2              processes of `make train` (default: one per GPU, or one on the CPU)
#   WORKERS=2            processes of `make test`
#   RECSYS_PYTHON=path   use this interpreter, with what it has installed, instead of .venv; nothing is set up
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup train test coverage lint format types check ci doctor bench clean distclean

RECSYS_PYTHON ?=
PYTHON := $(or $(RECSYS_PYTHON),.venv/bin/python)
ARGS ?=
WORKERS ?= 2

# Other distributions also call themselves `kernels` and `data`: the root comes first.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

CODE := recsys kernels data tests $(wildcard *.py) $(wildcard benchmarks)

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

setup: ## create .venv and install the pinned requirements, once
	@$(if $(RECSYS_PYTHON),true,requirements/setup.sh)

train: setup ## train: all GPUs, or the CPU where there is none; ARGS="model=small ..." overrides the config
	@n="$(NPROC)"; \
	if [ -z "$$n" ]; then n=$$($(PYTHON) -c 'import torch; print(torch.cuda.device_count())'); fi; \
	if [ "$$n" -ge 1 ]; then \
	  exec $(PYTHON) -m torch.distributed.run --standalone --nproc-per-node="$$n" train.py $(ARGS); \
	else \
	  exec $(PYTHON) train.py $(ARGS); \
	fi

test: setup ## run the tests; ARGS="tests/kernels -k window" picks some
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(WORKERS) --timeout=600 $(ARGS)

coverage: setup ## the tests, and which lines of recsys, kernels and data they run; fails below 85 %
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n $(WORKERS) --timeout=600 --cov --cov-report=term:skip-covered $(ARGS)

lint: setup ## ruff: rules and formatting
	$(PYTHON) -m ruff check $(CODE)
	$(PYTHON) -m ruff format --check $(CODE)

format: setup ## rewrite the code as `make lint` wants it
	$(PYTHON) -m ruff check --fix $(CODE)
	$(PYTHON) -m ruff format $(CODE)

types: setup ## mypy
	$(PYTHON) -m mypy

check: lint types test ## lint, types and tests

ci: ## what CI runs, from a clean checkout on
	.ci/run

doctor: setup ## versions and whether they fit, devices, usable attention backends
	@$(PYTHON) -m recsys.doctor

bench: setup ## measure; ARGS="..." picks what
	$(PYTHON) benchmark.py $(ARGS)

clean: ## remove caches and build outputs; runs, datasets and .venv stay
	rm -rf .pytest_cache .ruff_cache .mypy_cache .coverage .coverage.* htmlcov build *.egg-info
	find recsys kernels data tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## like clean, and .venv
	rm -rf .venv
