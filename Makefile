# Every target makes its own virtual environment; nothing but a python3 with `venv` and pip is needed.
# `make test PYTHON=python3.12` takes another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test slow oldest quality docs package bench clean

demo: $(STAMP)
	$(BIN)/meft demo

# One thread a process: two workers on two cores, and sums whose order does not depend on the machine's load.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

# What `make test` leaves out: minutes to hours.
slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

# The parts that read other libraries closest, with the oldest versions that are supported, in an environment of its own.
oldest:
	rm -rf .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt \
	    -e . datasets hypothesis pytest pytest-xdist pyyaml scikit-learn scipy trl
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 -m "not slow" tests/engine tests/loss tests/backbone \
	    tests/tuner tests/integrations/test_reversible.py -k "not SentenceTransformerTrainer"

quality: $(STAMP) docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages for users as a site in site/; a link to nowhere is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Wheel and sdist; then the wheel alone in an empty environment, where the README's lines are run.
package: $(STAMP)
	$(BIN)/python tests/project/package.py

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) .venv-oldest build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Built anew, never patched up, whenever the requirements change.
$(STAMP): pyproject.toml constraints.txt
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,quality]"
	touch $@
