# make train    set up .venv and train the default model; ARGS="..." are overrides of its configuration
# make test     set up .venv, check the code, run the tests; ARGS="..." go to pytest
# make lint     format, lint and type checks alone
# make format   rewrite the code in the house format

SHELL := /bin/bash
BIN := .venv/bin
STAMP := .venv/.installed
ARGS ?=

.PHONY: train test lint format setup

train: setup
	$(BIN)/python -m mbfn.train $(ARGS)

test: lint
	TORCH_COMPILE_DISABLE=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(STAMP)

# A machine's own torch (built for its GPUs) is kept where pyproject.toml allows it: the environment then sees it, and
# the pinned torch and its CUDA libraries are left out of the constraints.
$(STAMP): pyproject.toml constraints.txt
	@set -euo pipefail; \
	for candidate in python3.12 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.12*/bin/python3.12 python3; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$${python:-}" ]; then echo "error: no Python 3.12 found; install it (python3.12 on PATH, or pyenv install 3.12)" >&2; exit 2; fi; \
	own='import importlib.metadata as m, sys; v = m.version("torch").split("."); sys.exit((int(v[0]), int(v[1])) < (2, 11))'; \
	site=; skip='^$$'; \
	if "$$python" -c "$$own" 2>/dev/null; then site=--system-site-packages; skip='^(torch|triton|nvidia-.*|cuda-.*|numpy)=='; fi; \
	[ -x $(BIN)/python ] || "$$python" -m venv $$site .venv; \
	grep -Ev "$$skip" constraints.txt > .venv/constraints.txt; \
	PIP_CONSTRAINT=.venv/constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
