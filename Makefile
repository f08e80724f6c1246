# Every target uses .venv. `make setup` builds it once and rebuilds it only if its inputs change.
PYTHON ?= python3
DATA ?= data
PORT ?= 5000
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PACKAGES := preprocessing sdan tuning pipelines
export MLFLOW_DISABLE_TELEMETRY := true
export RAY_USAGE_STATS_ENABLED := 0

.DEFAULT_GOAL := help
SEED ?= 0
COUNT ?= 2000
.PHONY: help setup demo test test-slow test-cluster fuzz check benchmark-gpu ui monitoring constraints clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## create .venv with the exact versions of constraints.txt (7 GB, a few minutes the first time)

$(READY): pyproject.toml constraints.txt .ci/preflight.py
	@$(PYTHON) .ci/preflight.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing SDAN and its dependencies into $(VENV) (about 7 GB, a few minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,dev]'
	@touch $(READY)

demo: setup  ## simulate, preprocess, train, evaluate, zoom: small, on this machine
	@$(BIN)/sdan --data $(DATA) demo

test: setup  ## the test suite (under 12 minutes on 2 cores)
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not cluster" tests

test-slow: setup  ## kills, restarts, sweeps over the real trainer (about 50 minutes on 2 slow cores)
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow tests

test-cluster: setup  ## ray up, jobs and lost machines on two hosts in network namespaces (root; an idle machine)
	@$(BIN)/python -m pytest -m cluster -s tests/cluster

fuzz: setup  ## damaged RAW and JPG files through the decoders; SEED= and COUNT= (2,000 files: about a minute)
	@$(BIN)/python tests/preprocessing/fuzz.py --seed $(SEED) --count $(COUNT)

check: setup  ## lint, formatting, types, spelling
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/codespell

benchmark-gpu: setup  ## measure every GPU table of benchmarks/RESULTS.md (one GPU, under 8 minutes)
	@$(BIN)/python benchmarks/gpu.py --write

ui: setup  ## the MLflow UI on http://127.0.0.1:$(PORT)
	@$(BIN)/sdan --data $(DATA) ui --port $(PORT)

monitoring:  ## Prometheus and Grafana on 127.0.0.1:9090 and :3000 for the Ray of this machine (needs Docker)
	@docker compose -f deploy/monitoring/compose.yaml up

constraints: setup  ## write the versions installed in .venv to constraints.txt
	@{ head -n 1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sort -f; } > constraints.new
	@mv constraints.new constraints.txt

clean:  ## remove .venv and caches (never the data folder)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
