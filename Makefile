# Two commands on a fresh machine: `make demo` and `make test`. Each sets up .venv first, with the tested pins.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: demo test test-slow lint setup clean

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" ./demo.sh

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'slow or slurm'

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0 -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
