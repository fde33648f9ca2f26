# Needs Python 3.11 or newer, and nothing else: each target makes .venv first where it has to.

# The first of these that runs, is new enough and can make a virtual environment. `make PYTHON=...` overrides.
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,\
	$(shell $(name) -c 'import sys, ensurepip; sys.version_info < (3, 11) or print("$(name)")' 2>/dev/null)))

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.DELETE_ON_ERROR:
.PHONY: help demo test coverage fuzz lint format bench clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(READY)  ## See both errors, and their cure, on a checkpoint trained on GPUs
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh demo.sh

test: $(READY)  ## Run the tests; more for pytest in ARGS, as in make test ARGS="-k zip"
	$(BIN)/python -m pytest -n auto $(ARGS)

coverage: $(READY)  ## Run the tests and count branches: 95 % of what reads and writes files
	$(BIN)/python -m pytest -n auto --ignore tests/test_benchmarks.py --cov=ckptfix --cov-branch \
		--cov-report=term --cov-report=json:build/coverage.json $(ARGS)
	$(BIN)/python -m tests.branches build/coverage.json

fuzz: $(READY)  ## Feed the readers odd bytes, a minute a reader; ARGS="--seconds 600 pickle"
	@$(BIN)/python -c "import atheris" 2>/dev/null || $(PIP) --only-binary :all: 'atheris>=3' || { \
		echo "error: the fuzzer, atheris, has no wheel for this system or Python" >&2; \
		echo "hint: try Linux, or another Python: make clean fuzz PYTHON=python3.12" >&2; exit 1; }
	$(BIN)/python -m tests.fuzz.run $(ARGS)

lint: $(READY)  ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)  ## Format the code, and fix what ruff can fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(READY)  ## Compare speed and memory with the pasted recipe and with cp
	$(BIN)/python benchmarks/run.py $(ARGS)

clean:  ## Remove .venv and everything else that is not source
	rm -rf $(VENV) build dist *.egg-info htmlcov .coverage .coverage.* \
		.hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# setuptools first: torch needs it anyway, and so the build uses the pinned one.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer with venv on PATH" >&2; \
		echo "hint: name one with  make PYTHON=/path/to/python  (Debian, Ubuntu: apt install python3-venv)" >&2; \
		exit 1; }
	@echo "setting up $(VENV) (once; torch is a large download)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@$(BIN)/python -m compileall -q ckptfix
	@touch $@
