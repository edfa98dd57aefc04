# Everything a person types. `make` alone lists it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=
DEMO_OUT := out/demo

# Since 2.59 Ray may turn token auth on by itself; everything here runs on this machine alone.
export RAY_AUTH_MODE ?= disabled
export RAY_USAGE_STATS_ENABLED ?= 0
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-system lint fuse plan verify show train-tiny evaluate-tiny submit clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(VENV)/.done ## make .venv with everything pinned in constraints.txt

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@# --no-compile: writing byte code for 2 GB of packages takes longer than installing them
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt 'pip>=25'
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## fuse the bundled captions with the embedded model, on this machine, and show some
	@rm -rf $(DEMO_OUT)
	$(BIN)/python jobs/fuse.py conf/demo.yaml output.path=$(DEMO_OUT)
	$(BIN)/python jobs/verify.py output.path=$(DEMO_OUT) deep=true
	$(BIN)/python jobs/show.py output.path=$(DEMO_OUT)

test: setup lint ## the tests that need nothing but pip
	$(BIN)/python -m pytest -m 'not gpu and not system' $(ARGS)

test-system: setup ## the tests that need packages of the operating system (installs them with apt)
	bash tests/system/install.sh
	$(BIN)/python -m pytest -m system $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

fuse: setup ## run the job here: make fuse ARGS="input.path=… output.path=…"
	$(BIN)/python jobs/fuse.py $(ARGS)

plan: setup ## what it would take and cost, nothing written: make plan ARGS="…"
	$(BIN)/python jobs/plan.py $(ARGS)

verify: setup ## prove that no row was lost: make verify ARGS="output.path=…"
	$(BIN)/python jobs/verify.py $(ARGS)

show: setup ## fused captions in colour, in the terminal: make show ARGS="output.path=…"
	$(BIN)/python jobs/show.py $(ARGS)

submit: setup ## run on a cluster: make submit RAY_ADDRESS=http://head:8265 ARGS="…"
	@test -n "$(RAY_ADDRESS)" || { echo "RAY_ADDRESS=http://<head>:8265 is missing"; exit 2; }
	$(BIN)/ray job submit --address $(RAY_ADDRESS) --working-dir . --runtime-env deploy/runtime_env.yaml -- python jobs/fuse.py $(ARGS)

clean: ## remove what the targets made, but for .venv
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
