# make quickstart    the main job, end to end, in about a minute after set-up
# make test          all tests; without a GPU the kernels run in Triton's interpreter
# make kernels       compiles every kernel for every supported GPU, without one
# make bench         fastlora beside PEFT and others on this GPU, or CPU: a table, JSON and a plot in bench/results
# make gpu OUT=dir   on a machine with a GPU, torch, triton and transformers: tests, tuning and bench in nine minutes,
#                    with its own python3; WHEELS=dir holds what else may be imported
# make lint          style and types
# make setup         only the environment, in .venv
#
# On a machine with a GPU:  make setup TORCH='torch --index-url <your CUDA index>'

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: quickstart test kernels bench bench-cpu gpu lint setup
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,lint]'
	@touch $@

quickstart: $(READY)
	$(VENV)/bin/fastlora quickstart

# One thread per worker: the workers share the cores.
test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests --numprocesses $(JOBS)

kernels: $(READY)
	$(RUN) bench/compile_kernels.py --json build/kernels.json

bench-cpu: $(READY)
	$(RUN) -m pytest bench -q -m cpu --benchmark-quiet
	$(RUN) bench/report.py

bench: $(READY)
	@if $(RUN) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(RUN) -m pytest bench -q -m gpu --benchmark-quiet && $(RUN) bench/report.py --gpu; \
	else $(MAKE) bench-cpu; fi

# No environment is made and nothing is installed.
gpu:
	@test -n "$(OUT)" || { echo "a folder for the results is needed: make gpu OUT=dir"; exit 1; }
	$(PYTHON) bench/gpu_run.py $(OUT) $(if $(WHEELS),--wheels $(WHEELS))

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
