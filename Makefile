# Two commands on a machine with Python 3.11: `make demo` runs the main job, `make test` the whole test suite.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test oldest lint clean

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

# The lower bounds of pyproject.toml, together, but for torch: its oldest wheels are gigabytes, so that it is the main
# environment's. The core of the suite, what reads files above all; torch-fidelity is not there.
OLDEST := .venv-oldest/bin
CORE := tests/test_recipe.py tests/data tests/test_weights.py tests/backbones/test_pipeline.py \
	tests/metrics tests/report tests/training/test_trainer.py tests/security/test_pipelines.py

oldest:
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) scripts/oldest_constraints.py > .venv-oldest/constraints.txt
	$(OLDEST)/pip install --quiet -c .venv-oldest/constraints.txt -e '.[test]'
	OMP_NUM_THREADS=1 $(OLDEST)/python -m pytest -q -n 2 -p no:cacheprovider $(CORE) --ignore tests/metrics/test_features.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .venv-oldest runs robustdiff-demo
