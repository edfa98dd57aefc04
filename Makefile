# Everything a person types. `make` alone lists it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=
DEMO_OUT := out/demo

export RAY_USAGE_STATS_ENABLED ?= 0
export TOKENIZERS_PARALLELISM ?= false
# The packages are installed without byte code; it is written on first use, or every Ray worker would compile them again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-system test-hosts test-ceph chaos train train-tiny average evaluate lint fuse plan pair label verify show report export takedown submit resume status stop manifests configuration clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(VENV)/.done ## make .venv with everything pinned in constraints.txt

# uv installs what pip would, many times faster: it shares files between environments instead of copying 2 GB. It is
# told the folders of wheels that pip is configured with, so that a CPU build of torch at hand is the one taken.
WHEELS = $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null || echo $$PIP_FIND_LINKS)
INSTALL = $(BIN)/uv pip install --quiet --python $(BIN)/python $(addprefix --find-links ,$(WHEELS)) -c constraints.txt

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt uv
	$(INSTALL) -e '.[dev]'
	@touch $@

demo: setup ## fuse the bundled captions on this machine, verify the result, and show some
	@rm -rf $(DEMO_OUT)
	$(BIN)/capsfusion fuse conf/demo.yaml output.path=$(DEMO_OUT)
	$(BIN)/capsfusion verify output.path=$(DEMO_OUT) deep=true
	$(BIN)/capsfusion show output.path=$(DEMO_OUT)

test: setup ## the tests that need nothing but pip
	$(BIN)/python -m pytest -m 'not gpu' -n logical --maxprocesses 4 --dist loadfile --durations 15 --ignore tests/system --ignore tests/ceph $(ARGS)

# What needs more than pip brings. As root, as in a container, or with SUDO=sudo.
SUDO ?=
PACKAGE_ip := iproute2
/usr/bin/chromium /usr/bin/prometheus /usr/sbin/ip /usr/bin/radosgw /usr/bin/ceph-mon /usr/bin/ceph-osd:
	$(SUDO) apt-get update -qq
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(or $(PACKAGE_$(notdir $@)),$(notdir $@))

test-system: setup /usr/bin/chromium /usr/bin/prometheus ## the tests that need system packages, which it installs by apt: the report in a browser, a Prometheus on a run
	$(INSTALL) -e '.[dev,system]'
	$(BIN)/python -m pytest -rs tests/system --ignore tests/system/test_three_hosts.py $(ARGS)

test-hosts: setup /usr/sbin/ip ## three hosts in network namespaces, of which one is killed and one cut off; root, some minutes
	$(BIN)/python -m pytest -rs tests/system/test_three_hosts.py $(ARGS)

test-ceph: setup /usr/bin/radosgw /usr/bin/ceph-mon /usr/bin/ceph-osd ## the job killed and resumed on a real object store, Ceph, which it installs by apt and starts on this machine
	$(BIN)/python -m pytest tests/ceph $(ARGS)

# A round draws from the seed and its number alone: ARGS='--only 7' plays round 7 again.
SEED    ?= 1
MINUTES ?= 10
chaos: setup ## faults at random on a local cluster of three nodes, each output verified: make chaos SEED=1 MINUTES=60
	$(BIN)/python tests/chaos/chaos.py --seed $(SEED) --minutes $(MINUTES) $(ARGS)

# The published example triples; they are not part of the project.
TRIPLES ?= ../shared/data/capsfusion_pairs_8000.json
train-tiny: setup ## train the embedded model anew into out/capsfusion-tiny: make train-tiny TRIPLES=…json; hours on a CPU, resumes
	$(BIN)/capsfusion train conf/train/tiny.yaml data.path=$(TRIPLES) output.path=out/capsfusion-tiny-supervised $(ARGS)
	$(BIN)/capsfusion train conf/train/tiny_reinforce.yaml data.path=$(TRIPLES) output.path=out/capsfusion-tiny-a $(ARGS)
	$(BIN)/capsfusion train conf/train/tiny_reinforce.yaml data.path=$(TRIPLES) optim.seed=2 optim.steps=570 optim.decay_steps=70 \
	  reinforce.drift=0.5 output.path=out/capsfusion-tiny-b $(ARGS)
	$(BIN)/capsfusion average models=[out/capsfusion-tiny-a,out/capsfusion-tiny-b] shares=[0.6,0.4] output.path=out/capsfusion-tiny

train: setup ## train or fine-tune a fusion model: make train ARGS="conf/train/….yaml data.path=… output.path=…"
	$(BIN)/capsfusion train $(ARGS)

average: setup ## one model out of several trained from one start: make average ARGS="models=[a,b] shares=[0.7,0.3] output.path=…"
	$(BIN)/capsfusion average $(ARGS)

evaluate: setup ## figures of a model or an output beside the baselines: make evaluate ARGS="data.path=… engine.model=…"
	$(BIN)/capsfusion evaluate $(ARGS)

lint: setup ## formatter, ruff and mypy: nothing is changed, what is wrong is named
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fuse: setup ## run the job here: make fuse ARGS="input.path=… output.path=…"
	$(BIN)/capsfusion fuse $(ARGS)

plan: setup ## what it would take and cost, nothing written: make plan ARGS="…"
	$(BIN)/capsfusion plan $(ARGS)

pair: setup ## join raw and synthetic captions of two tables: make pair ARGS="raw.path=… synthetic.path=… output.path=…"
	$(BIN)/capsfusion pair $(ARGS)

label: setup ## teacher labels through an API: make label ARGS="input.path=… output.path=… engine.api.url=… engine.api.model=…"
	$(BIN)/capsfusion label $(ARGS)

verify: setup ## prove that no row was lost: make verify ARGS="output.path=…"
	$(BIN)/capsfusion verify $(ARGS)

show: setup ## fused captions in colour, in the terminal: make show ARGS="output.path=…"
	$(BIN)/capsfusion show $(ARGS)

report: setup ## the page on an output, finished or running: make report ARGS="output.path=…"
	$(BIN)/capsfusion report $(ARGS)

export: setup ## a folder for the Hugging Face hub and img2dataset: make export ARGS="output.path=… to=…"
	$(BIN)/capsfusion export $(ARGS)

takedown: setup ## take rows out of an output: make takedown ARGS="output.path=… urls=gone.txt"
	$(BIN)/capsfusion takedown $(ARGS)

# A Ray cluster's dashboard; for KubeRay: kubectl port-forward service/<cluster>-head-svc 8265
RAY_ADDRESS ?= http://127.0.0.1:8265
RUNTIME_ENV ?= deploy/runtime_env.yaml
submit: setup ## run the job on a Ray cluster: make submit RAY_ADDRESS=http://head:8265 ARGS="input.path=… output.path=…"
	env -u RAY_ADDRESS $(BIN)/capsfusion submit address=$(RAY_ADDRESS) runtime_env=$(RUNTIME_ENV) fuse $(ARGS)

resume: submit ## the same as submit: what is committed is not done again

status: setup ## the jobs of that cluster
	env -u RAY_ADDRESS $(BIN)/ray list jobs --address $(RAY_ADDRESS)

stop: setup ## stop a job by its id; what is committed stays: make stop RAY_ADDRESS=… JOB=fuse-…
	env -u RAY_ADDRESS $(BIN)/ray job stop --address $(RAY_ADDRESS) $(JOB)

PROMETHEUS_RELEASE ?= prometheus
manifests: setup ## render deploy/kuberay into out/manifests, one file an overlay, and one for Prometheus and Grafana
	@mkdir -p out/manifests
	@for o in deploy/kuberay/overlays/*; do $(BIN)/python deploy/kuberay/render.py $$o > out/manifests/$$(basename $$o).yaml || exit 1; done
	@$(BIN)/python deploy/monitoring/kubernetes.py $(PROMETHEUS_RELEASE) > out/manifests/monitoring.yaml
	@ls out/manifests/*.yaml

configuration: setup ## write docs/configuration.md from the typed configs
	$(BIN)/python docs/make_configuration.py

clean: ## remove what the targets made, but for .venv
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
