PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: run test lint bench bench-quick faults conformance interop live clean

run: $(VENV)/.ready            ## the demo: the practice exchange, two connections, messages on the terminal
	$(BIN)/collector run configs/demo.toml --watch

test: lint                     ## everything that needs no network
	$(BIN)/pytest -n 6 --dist worksteal

lint: $(VENV)/.test            ## what needs no running
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

bench: $(VENV)/.test           ## all but the long run (half an hour); BENCH="--only speed" for a part, "--only steady" for that hour
	$(BIN)/python -m tests.bench --skip steady --json build/bench.json $(BENCH)

bench-quick: $(VENV)/.test     ## a smoke run of all of it
	$(BIN)/python -m tests.bench --quick

conformance: $(VENV)/.test .venv-conformance/.ready   ## clients that others wrote, against the practice exchange
	COLLECTOR_CONFORMANCE=.venv-conformance/bin/python $(BIN)/pytest tests/conformance

.venv-conformance/.ready: tests/conformance/requirements.txt
	$(PYTHON) -m venv .venv-conformance
	.venv-conformance/bin/pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

interop: $(VENV)/.test         ## subscribers in Go, Rust, Java and JavaScript, where their tools are installed; built in build/interop
	COLLECTOR_INTEROP=1 $(BIN)/pytest -rs tests/interop

live: $(VENV)/.test            ## the whole program against test.deribit.com; says so and skips where that cannot be
	COLLECTOR_LIVE=1 $(BIN)/pytest -rs tests/test_live.py

clean:
	rm -rf build $(VENV) .venv-conformance .pytest_cache .mypy_cache .ruff_cache .hypothesis

faults: $(VENV)/.test          ## seeded cases of loss against what really happened; CASES=2000 PROGRAMS=48 SEED=0
	$(BIN)/python -m tests.faults --cases $(or $(CASES),2000) --programs $(or $(PROGRAMS),48) --seed $(or $(SEED),0)
