# Everything here sets itself up: the first call makes a virtual environment in .venv and
# installs what the target needs; a later call does so again when pyproject.toml changed.
#
#   make demo                      train on digits, dense and 2:4 side by side
#   make test                      run the test suite
#   make install                   only make the environment that the tests need
#   make lint / format / docs      checks, formatting, HTML documentation
#   PYTHON=python3.12 make test    choose the interpreter (3.11 or newer)

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1

BIN := $(VENV)/bin
VERSION = import sys; print("%d.%d" % sys.version_info[:2])

.PHONY: help demo install test lint format docs clean
help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.has-examples
	$(BIN)/python examples/cifar10.py $(ARGS)

install: $(VENV)/.has-test

test: $(VENV)/.has-test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(VENV)/.has-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.has-test
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

docs: $(VENV)/.has-docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf $(VENV) docs/_build .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# A stamp file says that an extra is installed as pyproject.toml asks. Another extra then
# adds its packages alone: to install nmjax again would build its library again.
$(VENV)/.has-%: pyproject.toml $(VENV)/.interpreter
	@echo "installing nmjax[$*] in $(VENV); the first time this takes minutes"
	@if [ -n "$$(find $(VENV) -maxdepth 1 -name '.has-*' -newer pyproject.toml \
	    -newer $(VENV)/.interpreter)" ]; then nmjax=nmjax; else nmjax='--editable .'; fi; \
	set -x; $(BIN)/python -m pip install --quiet $$nmjax"[$*]"
	@touch $@

# The environment is made anew only when the interpreter's version is another one.
$(VENV)/.interpreter: FORCE
	@found=$$($(PYTHON) -c '$(VERSION)') || \
	  { echo "error: cannot run '$(PYTHON)'; name a Python >= 3.11, as in" \
	         "'PYTHON=python3.12 make test'" >&2; exit 1; }; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: nmjax needs Python >= 3.11, but '$(PYTHON)' is $$found;" \
	         "name a newer one, as in 'PYTHON=python3.12 make test'" >&2; exit 1; }; \
	has=$$($(BIN)/python -c '$(VERSION)' 2>/dev/null); \
	if [ "$$has" != "$$found" ]; then \
	  echo "making $(VENV) with Python $$found"; \
	  $(PYTHON) -m venv --clear $(VENV) || exit 1; \
	fi; \
	[ "$$(cat $@ 2>/dev/null)" = "$$found" ] || echo "$$found" > $@
FORCE:
