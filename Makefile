# make quickstart: install, then run the example.   make test: install, then run all checks.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: quickstart test lint

quickstart: $(VENV)/examples
	$(RUN) examples/quickstart.py

test: $(VENV)/dev lint
	$(RUN) -m pytest -n 2

lint: $(VENV)/dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# A stamp for each set of packages, renewed when what they are made from changes.
$(VENV)/examples $(VENV)/dev: pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[$(@F)]"
	touch $@
