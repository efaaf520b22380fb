# Two commands on a machine with Python 3.11: `make demo` runs the main job, `make test` the whole test suite.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Python compiles the few modules that are imported; pip would compile all of them, a minute of work.
INSTALL := --quiet --no-compile

.PHONY: setup demo test oldest lint docs clean

setup: $(VENV)/ready

# torch-fidelity asks for torchvision, which its Inception network does not use: installed without it.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(INSTALL) -c constraints.txt -e '.[test,dev,docs]'
	$(BIN)/pip install $(INSTALL) --no-deps 'torch-fidelity>=0.3'
	touch $@

demo: setup
	$(BIN)/robustdiff demo

# Two workers of one thread each: threads of two would wait for each other. Each begins with a half of the tests, in
# their order, so that what the tests of a module share is made once.
WORKERS := -n 2 --dist worksteal

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) --durations 50 --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

# The lower bounds of pyproject.toml, together, but for torch: its oldest wheels are gigabytes, so that it is the main
# environment's. The core of the suite, what reads files above all; torch-fidelity is not there, and what a browser makes of
# a page does not depend on them.
OLDEST := .venv-oldest/bin
CORE := tests/test_recipe.py tests/data tests/test_weights.py tests/backbones/test_pipeline.py \
	tests/metrics tests/report tests/training/test_trainer.py tests/security/test_pipelines.py
LEFT_OUT := --ignore tests/metrics/extractors/test_extractor.py --ignore tests/report/test_browser.py

.venv-oldest/ready: pyproject.toml constraints.txt scripts/oldest_constraints.py
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) scripts/oldest_constraints.py > .venv-oldest/constraints.txt
	$(OLDEST)/pip install $(INSTALL) -c .venv-oldest/constraints.txt -e '.[test]'
	touch $@

oldest: .venv-oldest/ready
	OMP_NUM_THREADS=1 $(OLDEST)/python -m pytest -q $(WORKERS) -p no:cacheprovider $(CORE) $(LEFT_OUT)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in site/: warnings are errors, but not with --quiet, and nothing is fetched. (Material's note on its successor
# is no warning.)
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf site $(VENV) .venv-oldest runs robustdiff-demo
