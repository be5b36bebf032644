# make demo     train a small model for a few minutes, break it, see it recover (FRESH=1: anew)
# make demo-slurm  the same on a real Slurm of five nodes that it starts here, as root: a node dies,
#               another's GPU reports an ECC error, both are swapped; some four minutes
# make test     lint, types, import contracts, tests, fast ones first; JOBS=2 files at a time
# make test-end-to-end   whole runs that break and recover, a Slurm; SLOW_JOBS=4 files at a time, as
#               they wait half of the time
# make test-whole   every case of the tests that those two run in a short form
# make simulate  a run with its disasters for each of SEEDS=2000 seeds from FIRST=0, on a virtual clock;
#               a seed that breaks an invariant is named with the command that runs it again
# make chaos    fourteen faults, in the order of SEED=0, on a real Slurm of six nodes that it starts here, as
#               root; every bit is compared with a run that nothing happens to
# make test-resume  kill a run KILLS=50 times at moments drawn from SEED=7, compare every bit
# make benchmarks  ours against peers, on this CPU: minutes; let nothing else run meanwhile
# make benchmarks-gpu  training steps on one GPU: tokens/s, MFU, memory
# make benchmarks-stability  training that goes wrong in 41 ways, left alone, under two published guards
#               and under ours, each beside its twin, and healthy runs; hours
# make docs     rewrite the generated parts of README.md and docs/
# make clean    remove the environment and caches; runs/ and prepared/ stay

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
TORCH := torch==2.13.0
JOBS ?= 2
SLOW_JOBS ?= 3
KILLS ?= 50
SEED ?=
SEEDS ?= 2000
FIRST ?= 0

# Where it is set, each rank, agent and command of a test compiles the sources anew.
unexport PYTHONDONTWRITEBYTECODE

# Without processes or torch, in a minute: most mistakes show here. Behind it what starts ranks.
PURE := tests/protocol tests/diagnosis tests/link tests/project tests/stability tests/supervisor \
  tests/simulation
NOT_PURE := $(addprefix --ignore ,$(filter-out tests/supervisor,$(PURE))) \
  --ignore-glob 'tests/supervisor/test_*.py'
TESTS := $(BIN)/python -m pytest -n $(JOBS) --durations=20 -m "not slow and not whole"
# The longest files first, as they are named.
LONGEST := tests/slurm tests/faults tests/end_to_end
ROOMS := $(LONGEST) $(filter-out $(LONGEST) %/__pycache__,$(patsubst %/,%,$(wildcard tests/*/)))
SLOW_TESTS := $(BIN)/python -m pytest -n $(SLOW_JOBS) --dist loadfile --no-loadscope-reorder --durations=40 $(ROOMS)

.PHONY: demo demo-slurm test test-end-to-end test-whole simulate chaos test-resume benchmarks \
  benchmarks-gpu benchmarks-stability venv docs clean
.DEFAULT_GOAL := demo

venv: $(VENV)/installed

# torch first: it is the largest, and whoever wants another build of it installs that into .venv and
# goes on from here.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "opt-train needs Python 3.11 or newer, and $(PYTHON) is not; name one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "Python's venv module is missing; install it with: apt-get install $(notdir $(PYTHON))-venv"; exit 1; }
	@echo "making the environment $(VENV) (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH)"
	@$(PIP) $(TORCH)
	@echo "installing opt-train and what it needs"
	@$(PIP) -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "installing what the tests need"
	@$(PIP) -e '.[dev]'
	@touch $@

# The trap keeps the shell waiting through Ctrl-C while the run saves its state.
demo: $(VENV)/installed
	@test -z "$(filter-out 0,$(FRESH))" || rm -rf runs/demo
	@trap : INT; $(BIN)/opt-train run experiment=demo; code=$$?; \
	if [ $$code -eq 75 ]; then echo "stopped with its state saved; make demo goes on from there"; exit 0; fi; \
	exit $$code

demo-slurm: $(VENV)/installed
	@$(BIN)/python -m tests.slurm.demo

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(TESTS) --dist worksteal $(PURE) --ignore tests/supervisor/shell
	$(TESTS) --dist loadfile --ignore tests/end_to_end $(NOT_PURE)

test-end-to-end: $(VENV)/installed-dev
	$(SLOW_TESTS) -m slow

test-whole: $(VENV)/installed-dev
	$(SLOW_TESTS) -m whole

simulate: $(VENV)/installed
	@$(BIN)/python -m opt_train.simulation --seeds $(SEEDS) --first $(FIRST)

chaos: $(VENV)/installed-dev
	$(BIN)/python -m tests.slurm.chaos $(if $(SEED),--seed $(SEED))

test-resume: $(VENV)/installed-dev
	$(BIN)/python -m tests.resume.kills --kills $(KILLS) $(if $(SEED),--seed $(SEED))

benchmarks: $(VENV)/installed-dev
	$(BIN)/python benchmarks/step_cpu.py
	$(BIN)/python benchmarks/step_cpu.py --bf16
	$(BIN)/python benchmarks/memory_cpu.py --batch 16
	$(BIN)/python benchmarks/memory_cpu.py
	$(BIN)/python benchmarks/loop_overhead.py
	$(BIN)/python benchmarks/exchange_memory.py
	$(BIN)/python benchmarks/save_cpu.py
	$(BIN)/python benchmarks/snapshot_cpu.py
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/supervisor_scale.py

benchmarks-gpu: $(VENV)/installed-dev
	$(BIN)/python benchmarks/step_gpu.py
	$(BIN)/python benchmarks/step_gpu.py --sizes 1.3b --profile

benchmarks-stability: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.stability
	$(BIN)/python -m benchmarks.stability --half held-out

docs: $(VENV)/installed
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
