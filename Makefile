PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
FRAMES := $(or $(COLLECTOR_FRAMES),)

.PHONY: run test lint bench faults conformance live clean

run: $(VENV)/.ready            ## the demo: the practice exchange, two connections, messages on the terminal
	$(BIN)/collector run configs/demo.toml --watch

test: $(VENV)/.test            ## everything that needs no network
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 4

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
