# Everything runs from .venv, which `make setup` builds once with plain venv and pip.
PYTHON ?= python3
PORT ?= 8000
BIN := .venv/bin
STAMP := .venv/installed
export RAY_USAGE_STATS_ENABLED := 0
GUARD := RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deployments.proxy_guard:middlewares

.PHONY: setup demo serve test chaos bench bench-rates bench-captures bench-replicas check fix train-organism

setup: $(STAMP)
$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up .venv, which takes a minute or two ..."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: setup
	PORT=$(PORT) $(BIN)/python -m deployments.demo

serve: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" RAY_AUTH_MODE=token $(GUARD) serve run serve_config.yaml

# Two at a time, and then, one after the other, those that start a cluster.
test: setup
	$(BIN)/python -m pytest -m "not ray" --numprocesses 2
	$(BIN)/python -m pytest -m ray

# What is lost under faults, load and abuse: 4 minutes; make chaos LONG=1: hours.
chaos: setup
	PYTHONPATH=tests $(BIN)/python -m chaos $(if $(LONG),--long)

# The engine beside what people run today: 15 minutes; make bench QUICK=1: 3.
bench: setup
	$(BIN)/python -m benchmarks.engine $(if $(QUICK),--quick)

# The estimators of rates beside brute force of the same cost: 15 minutes.
bench-rates: setup
	$(BIN)/python -m benchmarks.rates

# Captures on the resident pair beside one process for each prompt: 6 minutes.
bench-captures: setup
	$(BIN)/python -m benchmarks.captures

# One, two and four replicas, and two sweeps at once: 3 minutes.
bench-replicas: setup
	$(BIN)/python -m benchmarks.replicas

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

fix: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

train-organism: setup
	$(BIN)/python -m organisms.train
	$(BIN)/python -m organisms.rarer
	$(BIN)/python -m organisms.train_benign
	$(BIN)/python -m organisms.evaluate
	$(BIN)/python -m organisms.train_trigger
	$(BIN)/python -m organisms.evaluate_trigger
