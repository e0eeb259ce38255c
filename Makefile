# Two commands on a fresh machine: `make demo` runs the whole job, `make test` passes the tests.
# Both make the environment first. Linux installs of torch bring CUDA libraries unless pip is pointed at a CPU build
# (PIP_EXTRA_INDEX_URL); set EXTRAS or PYTHON to choose others. pip would compile every file of every package, half its time;
# Python compiles those that are imported.
comma := ,
PYTHON ?= python3
VENV ?= .venv
SOAK ?= 25000
CALLS ?= 1000
LONG ?= 1
KILLS ?= 100
BIN := $(VENV)/bin
# A process per core, one thread each; a file's tests share what they prepare, so they stay together. Files keep the order
# of tests/conftest.py, the slow ones first.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
# TensorRT-RTX builds engines without a GPU, so its tests run wherever its wheel exists.
EXTRAS ?= $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' '-')),dev$(comma)rtx,dev)

.PHONY: setup demo test quick check style types imports site containers bench soak clean

setup: $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

$(VENV)/.installed-%: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

demo: setup ## synthesize, train, export, verify, predict, evaluate, bench, draw
	$(BIN)/ccnet demo --out demo

test: setup ## every test that this machine can run
	$(PYTEST)

quick: setup ## the tests without the slow ones
	$(PYTEST) -m "not slow"

soak: setup ## SOAK mutations of each kind of file, kills at CALLS calls of each command, LONG (share of) long runs, KILLS of a corpus run
	CCNET_FUZZ=$(SOAK) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist load tests/test_fuzz.py tests/test_fuzz_runs.py --durations=0
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python tests/kills.py --kills $(CALLS)
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --share $(LONG)
	CCNET_KILLS=$(KILLS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_corpus_kills.py tests/test_corpus_ray.py

check: style types imports site containers ## all that can be checked without running the code

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports

site: setup ## the documentation, into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs --quiet build --strict

containers: setup
	$(BIN)/hadolint containers/*.Dockerfile

bench: setup ## regenerate benchmarks/results; options in BENCH, such as BENCH=--no-compile
	$(BIN)/python -m benchmarks $(BENCH)

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
