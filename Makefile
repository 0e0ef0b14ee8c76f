# `make demo` and `make test` do everything: they make .venv, install what they need, and run. A second run installs nothing.
# Needs: make, and Python 3.11 or newer with its venv module.

.DELETE_ON_ERROR:

# The first of these that is new enough and can make a virtual environment; `make PYTHON=…` chooses another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv pip install --python $(BIN)/python

# The mark of a finished set-up, named after the place (a virtual environment cannot be moved) and what was installed there.
HERE := $(VENV)/ready-$(shell pwd | cksum | cut -d' ' -f1)
READY := $(HERE)-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

# The Java package stops at this version, so every bundle must run in it.
ORT_OLDEST := 1.29.0
ORT := $(VENV)/onnxruntime-$(ORT_OLDEST)

.PHONY: help demo test lint bench docs format constraints clean

help:
	@echo 'make demo         export, build a pool, serve it, three users customize; ends with the place of its report'
	@echo 'make test         every test; ARGS="-m \"not slow\"" or ARGS=tests/runtime for some of them'
	@echo 'make lint         ruff and mypy'
	@echo 'make bench        the table of numbers of this machine'
	@echo 'make docs         the documentation, in site/'
	@echo 'make format       rewrite the sources as the linter wants them'
	@echo 'make constraints  resolve the pinned versions again'
	@echo 'make clean        remove .venv and everything generated'

demo: $(READY)
	$(BIN)/crayon demo $(ARGS)

test: $(READY) $(ORT)
	CRAYON_ORT_OLDEST='$(CURDIR)/$(ORT)' $(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(READY)
	$(BIN)/python -m benchmarks $(ARGS)

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'documentation: site/index.html'

constraints: $(READY)
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --upgrade \
		--no-header --no-annotate --output-file constraints.txt pyproject.toml

clean:
	rm -rf $(VENV) site build dist .mypy_cache .pytest_cache .ruff_cache

# No mark means that there was no set-up here, or that it was interrupted: start from nothing. With an older mark, uv installs the difference.
$(READY):
	@if [ -z "$(PYTHON)" ]; then \
		echo 'No usable Python found: 3.11 or newer is needed, with its venv module.' >&2; \
		echo 'On Debian or Ubuntu: apt-get install python3 python3-venv. Or name one: make PYTHON=/path/to/python3.12' >&2; \
		exit 1; fi
	@if ! ls $(HERE)-* >/dev/null 2>&1; then \
		echo 'Setting up .venv …'; \
		$(PYTHON) -m venv --clear $(VENV) && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv; fi
	@rm -f $(VENV)/ready-*
	@echo 'Installing the pinned packages; most of it is torch …'
	@$(UV) --constraints constraints.txt --build-constraints constraints.txt --editable '.[dev]'
	@touch $@

$(ORT): | $(READY)
	@echo 'Installing the oldest supported onnxruntime …'
	@rm -rf $@.partial
	@$(UV) --no-deps --target $@.partial onnxruntime==$(ORT_OLDEST)
	@mv $@.partial $@
