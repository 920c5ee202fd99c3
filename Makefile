# Each target makes its own virtual environment in $(VENV), and again when pyproject.toml or constraints.txt change.
#   make test    make faults    make demo    make lint    make clean    PYTHON=python3.12 make venv
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo test faults lint clean

venv: $(STAMP)

# torch goes first and alone, so that whichever build of it pip finds, no other package asks for another one.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -q

faults: $(STAMP)
	$(BIN)/python tests/faults/long.py --json benchmarks/results/faults.json

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
