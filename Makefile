# Everything a newcomer and CI do. Needs python3 (3.11 to 3.13) with its venv module, and make; nothing else.
# EXTRAS=dev,oracle adds the tests that compare with PyTorch. PYTHON=python3.12 picks another interpreter.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
PYTEST_ARGS ?=
MODEL ?= smollm2-135m-instruct
PROMPT ?= Explain in three sentences why the sky is blue.

# Without bytecode, every start would parse JAX and all else anew: seconds. Container images often forbid to write it.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
comma := ,
# One stamp for each set of extras: asking for more installs more, asking again installs nothing.
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: run native test test-slow lint format bench wheel clean help
.DEFAULT_GOAL := help

help:
	@echo "make run        build .venv, fetch the demo model, stream an answer"
	@echo "make test       the test suite (test-slow: the tests that take long)"
	@echo "make lint       ruff and pyright"
	@echo "make format     let ruff rewrite the files"
	@echo "make bench      compare with other engines on this machine"
	@echo "make native     compile the native kernels again if their sources changed"
	@echo "make wheel      build dist/*.whl"
	@echo "make clean      remove what the others made; fetched models stay"

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is older than Python 3.11: install a newer one, or call make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "$(PYTHON) has no venv module: apt-get install python3-venv (Debian, Ubuntu)"; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# Not isolated: an isolated build would fetch a jaxlib of its own for the headers that `make native` finds in .venv.
# Not compiled to bytecode: Python does so with what it imports, a fraction of what is installed.
INSTALL := $(PIP) install --quiet --no-compile --no-build-isolation --editable
$(VENV)/.installed: pyproject.toml setup.py $(VENV)/.created
	@echo "installing atoma-jax (the first time takes a minute or two)"
	@$(PIP) install --quiet 'setuptools>=77'
	@$(INSTALL) .
	@touch $@

$(STAMP): $(VENV)/.installed
	@echo "installing atoma-jax[$(EXTRAS)]"
	@$(INSTALL) '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	@echo "installing atoma-jax[bench] (compiles llama.cpp: takes cmake, a C++ compiler and minutes)"
	@$(PIP) install --quiet --no-compile --editable '.[bench]' # isolated: llama-cpp-python brings its own build requirements
	@touch $@

# Without a compiler, the engine does without.
native: $(VENV)/.installed
	@$(BIN)/python -m atoma_jax.native.build || true

run: native
	@$(BIN)/atoma-jax pull $(MODEL) >/dev/null
	@$(BIN)/atoma-jax generate --model $(MODEL) --chat --temperature 0.2 --top-p 0.9 --prompt "$(PROMPT)"

test: $(STAMP) native
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(STAMP) native
	@$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(STAMP)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-bench native
	@$(BIN)/python -m bench.compare

wheel: $(STAMP)
	@$(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
