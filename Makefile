# Every target does its own set-up in .venv. Needs make and Python 3.11 or newer: `make demo PYTHON=python3.12`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VENV_PREPARE := .venv-prepare
WORKERS ?= 2
PYTEST_ARGS ?=
# Large arrays on huge pages (glibc 2.35 or newer; others ignore it): a training step on CPU touches gigabytes of fresh
# memory, and mapping it in small pages takes a quarter of the time (docs/results/benchmarks.md).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: help demo test test-runs test-parity test-prepare lint bench soak clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo         train on the bundled speech, encode, decode, evaluate (runs/demo/evaluation/report.html)'
	@echo 'make test         the default test suite (WORKERS=2 processes; PYTEST_ARGS=tests/test_cli.py)'
	@echo 'make test-runs    whole runs: trainings on meshes and hosts, kills, fine-tuning, sweeps, an evaluation'
	@echo 'make test-parity  comparison with the PyTorch references'
	@echo 'make test-prepare lmspt prepare on Apache Beam, in an environment of its own'
	@echo 'make lint         ruff'
	@echo 'make bench        paired benchmarks against the PyTorch references'
	@echo 'make soak         data from five formats compared, and half an hour of streaming, on 5 hours of speech (Debian)'
	@echo 'make clean        remove .venv, .venv-prepare and caches (not runs/)'

demo: $(VENV)/.demo
	$(BIN)/python -m lmspt_jax.demo --out runs/demo

# A test file's JAX programs share compilations, so a file stays in one process.
test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-runs: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(or $(PYTEST_ARGS),tests/runs)

test-parity: $(VENV)/.parity
	$(BIN)/python -m pytest tests/parity $(PYTEST_ARGS)

test-prepare: $(VENV_PREPARE)/.prepare
	$(VENV_PREPARE)/bin/python -m pytest tests/beam $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .

bench: $(VENV)/.parity
	$(BIN)/python benchmarks/codec.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/input_pipeline.py

# The corpus is made from Debian packages (190 MB).
soak: $(VENV)/.soak
	$(BIN)/python benchmarks/make_speech_corpus.py --out runs/soak/corpus
	$(BIN)/python benchmarks/data_order.py --corpus=runs/soak/corpus --work=runs/soak/formats
	$(BIN)/python benchmarks/data_sources.py --corpus=runs/soak/corpus --work=runs/soak/formats
	$(BIN)/python benchmarks/data_soak.py --corpus=runs/soak/corpus --work=runs/soak/shards

clean:
	rm -rf $(VENV) $(VENV_PREPARE) .pytest_cache .ruff_cache .jax_cache build dist lmspt_jax.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# A stamp per set of extras, newer than what it was installed from. -e: the checkout is what runs.
$(VENV)/.python $(VENV_PREPARE)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo 'make: error: $(PYTHON) is not Python 3.11 or newer: install one and say make PYTHON=python3.12' >&2; exit 1; }
	$(PYTHON) -m venv $(@D)
	@touch $@

# pesq and pyworld come as sources.
$(VENV)/.demo: $(VENV)/.python setup.py requirements/evaluate-no-deps.txt
	@$(BIN)/python -c 'import os, shutil, sys, sysconfig as s; sys.exit(not (shutil.which("cc") and shutil.which("c++") \
	  and os.path.isfile(os.path.join(s.get_path("include"), "Python.h"))))' || { echo 'make: error: no C and C++' \
	  'compiler, or no Python.h, to build pesq and pyworld with: apt-get install build-essential python3-dev' >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/evaluate-no-deps.txt
	@touch $@

$(VENV)/.test: $(VENV)/.demo setup.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo,test]'
	@touch $@

$(VENV)/.soak: $(VENV)/.test setup.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo,test,soak]'
	@touch $@

# Not in .venv: Beam holds protobuf below 7, which the other tests are not to depend on.
$(VENV_PREPARE)/.prepare: $(VENV_PREPARE)/.python setup.py
	$(VENV_PREPARE)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[prepare]' 'pytest>=8'
	@touch $@

$(VENV)/.parity: $(VENV)/.test setup.py requirements/parity-no-deps.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo,test,parity]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/parity-no-deps.txt
	@touch $@
