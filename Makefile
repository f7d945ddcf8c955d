# Every target sets up .venv by itself from the lock; see `make help`.
LOCK ?= envs/lock-cpu.txt
EXPERIMENT ?=
RUN ?= lora
ROW ?= 0
HOST ?= 127.0.0.1
PORT ?= 8000
PYTEST_ARGS ?=
WORKERS ?= 2
COVERAGE_ARGS ?=

export PYTHON TORCH_INDEX_URL

BIN := .venv/bin
OF_EXPERIMENT = $(if $(EXPERIMENT),--experiment $(EXPERIMENT))
INSPECT = $(BIN)/python -m dayzero.stages.inspect_rows $(OF_EXPERIMENT) --run $(RUN)
SERVE = $(BIN)/python -m dayzero.stages.serve $(OF_EXPERIMENT) --run $(RUN)
# The tests of a file share what they start, so a file stays on one worker. A worker that dies is a failure; with another
# in its place pytest-xdist would wait for ever.
WORKERS_OF_PYTEST = --numprocesses=$(WORKERS) --dist=loadfile --max-worker-restart=0
# A process has one thread, a worker one core.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest $(WORKERS_OF_PYTEST) --no-loadscope-reorder
SNAKEMAKE = $(BIN)/snakemake --cores all $(if $(EXPERIMENT),--config experiment=$(EXPERIMENT)) --

.DEFAULT_GOAL := help
.PHONY: help env demo status inspect test test-full test-slurm coverage lint serve clean

help:
	@echo "make demo             set up everything, run the default experiment from end to end, print its scores"
	@echo "make test             the tests, in two workers (WORKERS=1 for one; PYTEST_ARGS=... for pytest)"
	@echo "make test-full        the tests and the whole matrix of meshes, methods and models"
	@echo "make test-slurm       the tests on a private SLURM cluster, which must be installed"
	@echo "make coverage         every architecture of the installed transformers through the engine: docs/model-coverage.md"
	@echo "make lint             ruff, mypy, import-linter, snakefmt, snakemake --lint"
	@echo "make env              only install, into .venv (LOCK=envs/lock-gpu.txt with an NVIDIA GPU and CUDA 13)"
	@echo "make status           a live table of an experiment's runs and jobs (ONCE=1 prints it once)"
	@echo "make inspect RUN=lora ROW=0   a row of a run's tokens with what is supervised coloured"
	@echo "make serve RUN=lora   an OpenAI-compatible server on a run's model (HOST=127.0.0.1 PORT=8000)"
	@echo "make clean            remove .venv and caches; results/ stays"
	@echo "EXPERIMENT=name makes demo, status, inspect and serve act on another than config/config.yaml names (demo)."
	@echo "PYTHON=/path/to/python3.12 chooses the interpreter; TORCH_INDEX_URL=... adds a wheel index for torch."

env:
	@envs/install.sh $(LOCK)

demo: env
	$(SNAKEMAKE)
	@folder=$$($(BIN)/python -m dayzero.experiment $(EXPERIMENT) --print-folder) \
	  && $(BIN)/python -m dayzero.reporting.table "$$folder/report/results.csv"

test: env
	$(PYTEST) $(PYTEST_ARGS)

test-full: env
	$(PYTEST) -m "not slurm" $(PYTEST_ARGS)

test-slurm: env
	@$(BIN)/python -m tests.slurm.cluster check
	$(BIN)/pytest -m slurm tests/slurm $(WORKERS_OF_PYTEST) --durations=0 $(PYTEST_ARGS)

coverage: env
	$(BIN)/python -m tests.coverage.walk $(COVERAGE_ARGS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/snakefmt --check Snakefile workflow/rules
	$(BIN)/snakemake --lint

status: env
	@$(BIN)/python -m dayzero.status $(OF_EXPERIMENT) $(if $(ONCE),--once)

inspect: env
	@target=$$($(INSPECT) --print-target) && $(SNAKEMAKE) "$$target"
	@$(INSPECT) --row $(ROW)

serve: env
	@target=$$($(SERVE) --print-target) && $(SNAKEMAKE) "$$target"
	$(SERVE) --host $(HOST) --port $(PORT)

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build workflow/*.egg-info
	find workflow tests -name __pycache__ -type d -prune -exec rm -rf {} +
