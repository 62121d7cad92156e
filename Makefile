# Every target does its own set-up: a virtual environment in .venv with the pinned packages.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
QUICK_HEAD ?= hydra
QUICK_STEPS ?= 300
# `make comparison`: equal steps, text and tree budget, several training seeds.
COMPARED ?= $(notdir $(patsubst %/head.py,%,$(wildcard heads/*/head.py)))
SEEDS ?= 0 1 2
STEPS ?= 500
PROMPTS ?= assets/prompts/chat.jsonl
NUM_PROMPTS ?= 100
COMPARISON ?= results/comparison
# `make wheels`: the folder, the versions of Python and the lists of packages.
WHEELS ?= wheels
WHEELS_FOR ?= 3.11 3.12
WHEELS_OF ?= requirements.txt requirements-dev.txt requirements-cuda.txt

.PHONY: quickstart test test-fast fuzz interrupts lint setup setup-dev comparison expected report setup-cuda doctor
.PHONY: wheels gpu-check clean

quickstart: setup  ## train a head for two minutes, decode with a tree, compare with the baseline
	$(RUN) train.py --head $(QUICK_HEAD) --max-steps $(QUICK_STEPS) --features online --out runs/quickstart --overwrite
	$(RUN) bench/run.py --greedy --checkpoint runs/quickstart --out-dir results/quickstart
	$(RUN) bench/compare.py results/quickstart/*.json

test: setup-dev  ## the default test suite
	$(RUN) -m pytest

test-fast: setup-dev  ## under two minutes: no other process, no emulated GPU, no compiler
	$(RUN) -m pytest --fast

fuzz: setup-dev  ## hostile files for every reader: INPUTS=10000 or MINUTES=60; JSON=FILE for the figures
	$(RUN) -m tests.fuzz.campaign $(if $(INPUTS),--inputs $(INPUTS)) $(if $(MINUTES),--minutes $(MINUTES)) \
	  $(if $(SEED),--seed $(SEED)) $(if $(JSON),--json $(JSON))

interrupts: setup-dev  ## Ctrl-C at random moments of real trainings (RUNS)
	$(RUN) tests/interrupts/campaign.py $(if $(RUNS),--runs $(RUNS)) --out results/interrupts.json

lint: setup-dev
	$(RUN) -m ruff check .

comparison: setup  ## train and measure every head with every seed; existing results are kept
	@for head in $(COMPARED); do for seed in $(SEEDS); do \
	  test -f $(COMPARISON)/$$head-$$seed.json && continue; \
	  $(RUN) train.py --head $$head --seed $$seed --max-steps $(STEPS) --score-every $(STEPS) \
	    --out runs/comparison/$$head-$$seed --overwrite || exit 1; \
	  $(RUN) bench/run.py --greedy --checkpoint runs/comparison/$$head-$$seed --prompts $(PROMPTS) \
	    --num-prompts $(NUM_PROMPTS) --out $(COMPARISON)/$$head-$$seed.json || exit 1; \
	done; done
	$(RUN) bench/seeds.py $(COMPARISON)/*.json --against mlp --markdown $(COMPARISON)/README.md

expected: setup  ## the accept length that training expects, against decoding of the same held-out prompts
	$(RUN) -m trainer.data.splits --out runs/held-out.jsonl --head mlp
	@for head in $(COMPARED); do \
	  test -f results/expected/$$head.json && continue; \
	  $(RUN) train.py --head $$head --max-steps $(STEPS) --score-every $(STEPS) --out runs/expected/$$head --overwrite || exit 1; \
	  $(RUN) bench/run.py --greedy --checkpoint runs/expected/$$head --prompts runs/held-out.jsonl \
	    --out results/expected/$$head.json || exit 1; \
	done
	$(RUN) bench/compare.py results/expected/*.json

report:  ## write the results tables of results/README.md and of both READMEs from results/*.json
	$(RUN) bench/report.py results/*.json --out results/README.md --update README.md README_zh.md

doctor: setup  ## what this machine has, which device a run takes and why, how to install what is missing
	$(RUN) -m runtime.doctor

gpu-check: setup-dev setup-cuda  ## check a machine with a GPU; ends with a table of pass, fail and figures
	$(RUN) bench/gpu_check.py $(GPU_CHECK)

wheels: setup  ## collect all packages for a machine without a network; builds Jittor, which ships as source
	$(RUN) -m pip wheel --quiet --no-deps --wheel-dir $(WHEELS) $(filter jittor==%,$(file <requirements.txt))
	@for version in $(WHEELS_FOR); do for list in $(WHEELS_OF); do \
	  $(RUN) -m pip download --quiet --python-version $$version --only-binary=:all: --find-links $(WHEELS) \
	    --dest $(WHEELS) -r $$list || exit 1; \
	done; done
	@du -sh $(WHEELS)

setup: $(VENV)/.setup
setup-dev: $(VENV)/.setup-dev
setup-cuda: $(VENV)/.setup-cuda  ## CUDA 13's compiler and libraries, for a driver without a toolkit

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.setup: requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.setup-dev: requirements-dev.txt requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@ $(VENV)/.setup

$(VENV)/.setup-cuda: requirements-cuda.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-cuda.txt
	touch $@

clean:
	rm -rf $(VENV) .cache runs results/quickstart
