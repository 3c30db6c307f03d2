# Every target makes its own environment when it is missing or older than pyproject.toml: `make test` on a fresh clone works.
# VENV=/elsewhere uses another environment, PYTHON=python3.13 another interpreter, ARGS="-k lora" goes on to pytest.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
QUICK  := not slow and not net and not gpu
# Two workers of one thread each: torch's own threads would fight over the same cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: demo test test-all check format docs bench

demo: $(READY)
	$(BIN)/vtzoo demo

test: $(READY)
	$(PYTEST) -m "$(QUICK)" $(ARGS) tests

test-all: $(READY)
	$(PYTEST) $(ARGS) tests

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python scripts/make_docs.py --check

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	$(BIN)/python scripts/make_docs.py

bench: $(READY)
	for file in benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done

$(READY): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@
