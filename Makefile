# The commands of this project; `make` lists them. A job is also a command of its own: .venv/bin/capsfusion --help
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=
DEMO_OUT := out/demo

export RAY_USAGE_STATS_ENABLED ?= 0
export TOKENIZERS_PARALLELISM ?= false
# The packages are installed without byte code. Python writes it on first use: otherwise each Ray worker compiles all modules again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-system test-hosts test-ceph chaos train train-tiny average evaluate lint fuse plan pair label verify show report export takedown submit resume status stop manifests configuration map clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(VENV)/.done ## make .venv with the package versions of constraints.txt

# uv installs the same packages as pip, many times faster: environments share files, where pip copies 2 GB. It gets the wheel
# folders of pip's configuration, so that it takes a CPU build of torch from there.
WHEELS = $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null || echo $$PIP_FIND_LINKS)
INSTALL = $(BIN)/uv pip install --quiet --python $(BIN)/python $(addprefix --find-links ,$(WHEELS)) -c constraints.txt

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt uv
	$(INSTALL) -e '.[dev]'
	@touch $@

demo: setup ## fuse the bundled captions on this machine, verify the output, and show some captions
	@rm -rf $(DEMO_OUT)
	$(BIN)/capsfusion fuse conf/demo.yaml output.path=$(DEMO_OUT)
	$(BIN)/capsfusion verify output.path=$(DEMO_OUT) deep=true
	$(BIN)/capsfusion show output.path=$(DEMO_OUT)

test: setup ## run the tests that need only Python packages
	$(BIN)/python -m pytest -m 'not gpu' -n logical --maxprocesses 4 --dist loadfile --durations 15 --ignore tests/system --ignore tests/ceph $(ARGS)

# The tests below need system packages. Run them as root, as in a container, or with SUDO=sudo.
SUDO ?=
PACKAGE_ip := iproute2
/usr/bin/chromium /usr/bin/prometheus /usr/sbin/ip /usr/bin/radosgw /usr/bin/ceph-mon /usr/bin/ceph-osd:
	$(SUDO) apt-get update -qq
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(or $(PACKAGE_$(notdir $@)),$(notdir $@))

test-system: setup /usr/bin/chromium /usr/bin/prometheus ## test the report in a browser and the metrics with Prometheus; installs both by apt
	$(INSTALL) -e '.[dev,system]'
	$(BIN)/python -m pytest -rs tests/system --ignore tests/system/test_three_hosts.py $(ARGS)

test-hosts: setup /usr/sbin/ip ## test on three hosts in network namespaces: one is killed, one is cut off; needs root and some minutes
	$(BIN)/python -m pytest -rs tests/system/test_three_hosts.py $(ARGS)

test-ceph: setup /usr/bin/radosgw /usr/bin/ceph-mon /usr/bin/ceph-osd ## test killed and resumed jobs on Ceph, a real object store; installs it by apt and starts it on this machine
	$(BIN)/python -m pytest tests/ceph $(ARGS)

# The faults of a round depend on the seed and the number of the round alone: ARGS='--only 7' repeats round 7.
SEED    ?= 1
MINUTES ?= 10
chaos: setup ## test random faults on a local cluster of three nodes, and verify each output: make chaos SEED=1 MINUTES=60
	$(BIN)/python tests/chaos/chaos.py --seed $(SEED) --minutes $(MINUTES) $(ARGS)

# The published example triples; they are not part of the project.
TRIPLES ?= ../shared/data/capsfusion_pairs_8000.json
train-tiny: setup ## train the embedded model again into out/capsfusion-tiny: make train-tiny TRIPLES=…json; takes hours on a CPU; resumes
	$(BIN)/capsfusion train conf/train/tiny.yaml data.path=$(TRIPLES) output.path=out/capsfusion-tiny-supervised $(ARGS)
	$(BIN)/capsfusion train conf/train/tiny_reinforce.yaml data.path=$(TRIPLES) output.path=out/capsfusion-tiny-a $(ARGS)
	$(BIN)/capsfusion train conf/train/tiny_reinforce.yaml data.path=$(TRIPLES) optim.seed=2 optim.steps=570 optim.decay_steps=70 \
	  reinforce.drift=0.5 output.path=out/capsfusion-tiny-b $(ARGS)
	$(BIN)/capsfusion average models=[out/capsfusion-tiny-a,out/capsfusion-tiny-b] shares=[0.6,0.4] output.path=out/capsfusion-tiny

train: setup ## train or fine-tune a fusion model: make train ARGS="conf/train/….yaml data.path=… output.path=…"
	$(BIN)/capsfusion train $(ARGS)

average: setup ## average models that were trained from one start: make average ARGS="models=[a,b] shares=[0.7,0.3] output.path=…"
	$(BIN)/capsfusion average $(ARGS)

evaluate: setup ## compare a model or an output with references and baselines: make evaluate ARGS="data.path=… engine.model=…"
	$(BIN)/capsfusion evaluate $(ARGS)

lint: setup ## check the format, ruff and mypy; change nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fuse: setup ## fuse captions on this machine or on the cluster of RAY_ADDRESS: make fuse ARGS="input.path=… output.path=…"
	$(BIN)/capsfusion fuse $(ARGS)

plan: setup ## print what a fuse run would take and cost; write nothing: make plan ARGS="…"
	$(BIN)/capsfusion plan $(ARGS)

pair: setup ## join raw and synthetic captions of two tables: make pair ARGS="raw.path=… synthetic.path=… output.path=…"
	$(BIN)/capsfusion pair $(ARGS)

label: setup ## let a teacher model behind an API write captions to train on: make label ARGS="input.path=… output.path=… engine.api.url=… engine.api.model=…"
	$(BIN)/capsfusion label $(ARGS)

verify: setup ## prove that no row of an output was lost: make verify ARGS="output.path=…"
	$(BIN)/capsfusion verify $(ARGS)

show: setup ## show fused captions in the terminal: make show ARGS="output.path=…"
	$(BIN)/capsfusion show $(ARGS)

report: setup ## write the HTML page about an output, finished or running: make report ARGS="output.path=…"
	$(BIN)/capsfusion report $(ARGS)

export: setup ## copy an output into a folder for the Hugging Face hub and img2dataset: make export ARGS="output.path=… to=…"
	$(BIN)/capsfusion export $(ARGS)

takedown: setup ## remove rows from an output: make takedown ARGS="output.path=… urls=gone.txt"
	$(BIN)/capsfusion takedown $(ARGS)

# The dashboard of a Ray cluster; for KubeRay: kubectl port-forward service/<cluster>-head-svc 8265
RAY_ADDRESS ?= http://127.0.0.1:8265
RUNTIME_ENV ?= deploy/runtime_env.yaml
submit: setup ## fuse captions on a Ray cluster: make submit RAY_ADDRESS=http://head:8265 ARGS="input.path=… output.path=…"
	env -u RAY_ADDRESS $(BIN)/capsfusion submit address=$(RAY_ADDRESS) runtime_env=$(RUNTIME_ENV) fuse $(ARGS)

resume: submit ## the same as submit: committed units are not fused again

status: setup ## list the jobs of the cluster
	env -u RAY_ADDRESS $(BIN)/ray list jobs --address $(RAY_ADDRESS)

stop: setup ## stop a job by its id; its committed units are kept: make stop RAY_ADDRESS=… JOB=fuse-…
	env -u RAY_ADDRESS $(BIN)/ray job stop --address $(RAY_ADDRESS) $(JOB)

PROMETHEUS_RELEASE ?= prometheus
manifests: setup ## render deploy/kuberay into out/manifests: one file per overlay, and one for Prometheus and Grafana
	@mkdir -p out/manifests
	@for o in deploy/kuberay/overlays/*; do $(BIN)/python deploy/kuberay/render.py $$o > out/manifests/$$(basename $$o).yaml || exit 1; done
	@$(BIN)/python deploy/monitoring/kubernetes.py $(PROMETHEUS_RELEASE) > out/manifests/monitoring.yaml
	@ls out/manifests/*.yaml

configuration: setup ## write docs/configuration.md from the config dataclasses
	$(BIN)/python docs/make_configuration.py

map: setup ## write README's map of the files from the modules' docstrings
	$(BIN)/python docs/make_file_map.py

clean: ## remove what the targets made, except .venv
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
