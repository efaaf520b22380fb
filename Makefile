# Two commands on a machine with Python 3.11: `make demo` runs the main job, `make test` the whole test suite.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test lint clean

setup: $(VENV)/ready

# torch-fidelity asks for torchvision, which its Inception network does not use: installed without it.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test,dev]'
	$(BIN)/pip install --quiet --no-deps 'torch-fidelity>=0.3'
	touch $@

demo: setup
	$(BIN)/robustdiff demo

# Two workers of one thread each: threads of two would wait for each other.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs robustdiff-demo
