# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow check bench base-weights clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

# Teach the embedded model 24 concepts it has never seen, from files, and write runs/demo/report.html.
demo: $(READY)
	$(BIN)/vlmtune scenes runs/demo-data
	$(BIN)/vlmtune train demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow

check: $(READY)
	$(BIN)/ruff check vlmtune tests benchmarks
	$(BIN)/ruff format --check vlmtune tests benchmarks

bench: $(READY)
	$(BIN)/python benchmarks/losses/cross_entropy.py
	$(BIN)/python benchmarks/data/index.py
	$(BIN)/python benchmarks/losses/study.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/memory/measure.py
	$(BIN)/python benchmarks/ranks/study.py
	$(BIN)/python benchmarks/stability/study.py

# Train the embedded model's projector and language model again (about three hours on one core) and put them into the package.
base-weights: $(READY)
	$(BIN)/vlmtune train embedded_base
	rm -rf build/embedded_base build/embedded_base_boxes
	$(BIN)/vlmtune export runs/embedded_base build/embedded_base --checkpoint latest
	$(BIN)/vlmtune train embedded_base_boxes
	$(BIN)/vlmtune export runs/embedded_base_boxes build/embedded_base_boxes --checkpoint latest
	$(BIN)/vlmtune pack-embedded build/embedded_base_boxes
	$(BIN)/python benchmarks/embedded/card.py --runs runs/embedded_base runs/embedded_base_boxes --record

clean:
	rm -rf runs
