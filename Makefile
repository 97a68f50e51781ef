# Everything runs in .venv, made from nothing but Python (3.10 or newer); choose one with make PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: sample test check bench clean

sample: $(READY)  ## draw sixteen moons through all 1000 steps: samples.png
	$(BIN)/ddpm-fast sample --seeds 0-15 --out samples.png

test: $(READY)  ## every test that needs no GPU; those that do are counted as skipped
	$(BIN)/python -m pytest

check: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## benchmarks for a CPU
	$(BIN)/python -m pytest benchmarks --benchmark-only
	$(BIN)/python benchmarks/overhead.py

$(READY): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:  ## remove what was built
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
