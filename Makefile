# `make demo` and `make test` do everything: they make .venv, install what they need, and run. A second run installs nothing.
# Needs: make, and Python 3.11 or newer with its venv module; a C++ compiler for what runs ExecuTorch programs.

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

# The runner of ExecuTorch programs, built from its folder; the mark changes with its sources.
SOURCES := $(shell find runtime/native -type f ! -name '*.pyc' | LC_ALL=C sort)
CXX_SOURCES := $(filter %.cpp %.h,$(SOURCES))
VERSIONS := $(shell cat pyproject.toml constraints.txt $(SOURCES) | cksum | cut -d' ' -f1)
NATIVE := $(VENV)/native-$(VERSIONS)
SANITIZED := build/native-sanitized/ready-$(VERSIONS)
LINUX_CXX := $(shell [ "$$(uname)" = Linux ] && command -v $(CXX))
BUILD := $(BIN)/uv build --quiet --wheel --python $(BIN)/python --no-build-isolation
BUILD_NATIVE := $(BUILD) --config-setting cmake.define.CRAYON_TESTS=ON
REPAIR := PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair

# The same for ARM, by Debian's cross compiler and over the SDK in ExecuTorch's own wheel for ARM.
ARM := build/aarch64
ARM_READY := $(ARM)/ready-$(VERSIONS)

# What the benchmarks compare with: llama.cpp, compiled for this machine.
PEERS := $(VENV)/peers-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: help demo test lint bench docs native wheels aarch64 templates format constraints clean

help:
	@echo 'make demo         export, build a pool, serve it, three users customize; ends with the place of its report'
	@echo 'make test         every test; ARGS="-m \"not slow\"" or ARGS=tests/runtime for some of them'
	@echo 'make lint         ruff, clang-format and mypy'
	@echo 'make bench        the table of numbers of this machine'
	@echo 'make docs         the documentation, in site/'
	@echo 'make native       build and install the runner of ExecuTorch programs; the others do it where there is a C++ compiler'
	@echo 'make wheels       what a board installs, and crayon-bench, in dist/'
	@echo 'make aarch64      what the tests need to run on an emulated ARM board'
	@echo 'make format       rewrite the sources as the linter wants them'
	@echo 'make constraints  resolve the pinned versions again'
	@echo 'make clean        remove .venv and everything generated'

demo: $(READY) $(NATIVE)
	$(BIN)/crayon demo $(ARGS)

test: $(READY) $(NATIVE) $(SANITIZED) $(ORT)
	CRAYON_ORT_OLDEST='$(CURDIR)/$(ORT)' $(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(READY) $(NATIVE) $(PEERS) $(ORT)
	CRAYON_ORT_OLDEST='$(CURDIR)/$(ORT)' $(BIN)/python -m benchmarks $(ARGS)

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'documentation: site/index.html'

native: $(NATIVE)
	@test -e $(NATIVE)

# Everything that a board may install: both wheels for this CPU and for ARM, and crayon-bench with its libraries in an archive.
wheels: $(NATIVE) $(ARM_READY)
	@test -e $(NATIVE) && test -e $(ARM_READY)
	@rm -rf dist && mkdir dist
	@$(BUILD) --out-dir dist .
	@for build in build/native $(ARM); do \
		$(REPAIR) --wheel-dir dist $$build/wheel/*.whl && \
		archive=crayon-bench-$$(basename $$build/wheel/*.whl .whl | sed 's/.*-linux_//') && \
		$(BIN)/cmake --install $$build --prefix build/$$archive --strip >/dev/null && \
		$(BIN)/cmake --install $$build --component system --prefix build/$$archive >/dev/null && cp LICENSE build/$$archive && \
		tar -czf dist/$$archive.tar.gz -C build $$archive || exit 1; done
	@ls -l dist

aarch64: $(ARM_READY) $(ARM)/root
	@test -e $(ARM_READY)
	@rm -rf $(ARM)/site $(ARM)/edge
	@$(BUILD) --out-dir $(ARM)/edge .
	@$(UV) --quiet --python-version 3.11 --python-platform aarch64-manylinux_2_36 --only-binary :all: --constraints constraints.txt \
		--target $(ARM)/site $(ARM)/edge/*.whl $(ARM)/wheel/*.whl pytest pytest-timeout

$(ARM)/root: tests/native/aarch64_root.sh
	@echo "Fetching Debian's Python for ARM …"
	@tests/native/aarch64_root.sh $@ >/dev/null

# What exports of the demo's model and of MobileLLM-125M for ExecuTorch are filled from, so that nobody waits for its exporter; and what tests are.
NANO := server_tools/src/crayon_server/models/nano
SHIPPED := export/src/crayon_export/executorch/shipped
templates: $(READY)
	@echo 'Making the templates that come with the package …'
	@rm -rf $(SHIPPED) && mkdir -p $(SHIPPED)
	@scratch="$$(mktemp -d)" && trap 'rm -rf "$$scratch"' EXIT && \
		$(BIN)/crayon model create mobilellm-125m --vocab-size 32000 --out "$$scratch/mobilellm-125m" && \
		for model in $(NANO) "$$scratch/mobilellm-125m"; do \
			XDG_CACHE_HOME="$$scratch" $(BIN)/crayon template export $$model $(SHIPPED) --tokenizer $(NANO) || exit 1; done
	@$(BIN)/python -m tests.programs templates

constraints: $(READY)
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --upgrade --no-emit-package crayon-edge-native \
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

$(NATIVE): | $(READY)
	@if [ -z "$(LINUX_CXX)" ]; then \
		echo 'No C++ compiler: programs of ExecuTorch will not run here. On Debian or Ubuntu: apt-get install g++' >&2; \
	else \
		echo 'Building the runner of ExecuTorch programs …' && \
		rm -rf build/native/wheel $(VENV)/native-* && \
		$(BUILD_NATIVE) --config-setting build-dir='$(CURDIR)/build/native' --out-dir build/native/wheel runtime/native && \
		$(UV) --quiet --no-deps --force-reinstall build/native/wheel/*.whl && touch $@; fi

$(PEERS): | $(READY)
	@if [ -z "$(LINUX_CXX)" ]; then \
		echo 'No C++ compiler: llama.cpp cannot be compared with. On Debian or Ubuntu: apt-get install g++' >&2; \
	else \
		echo 'Compiling llama.cpp, to compare with: minutes …' && \
		CMAKE_ARGS='-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF' $(UV) --quiet --constraints constraints.txt --build-constraints constraints.txt \
			--no-cache --editable '.[bench]' && \
		rm -f $(VENV)/peers-* && touch $@; fi

# With AddressSanitizer, and not installed: only tests load it.
$(SANITIZED): | $(READY)
	@if [ -n "$(LINUX_CXX)" ]; then \
		echo 'Building it once more, with AddressSanitizer …' && \
		$(BIN)/cmake -S runtime/native -B build/native-sanitized -G Ninja -D CMAKE_MAKE_PROGRAM='$(abspath $(BIN))/ninja' --log-level=WARNING \
			-D CRAYON_SANITIZE=ON -D CRAYON_TESTS=ON -D CMAKE_PREFIX_PATH="$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" && \
		$(BIN)/cmake --build build/native-sanitized -- --quiet && \
		rm -f build/native-sanitized/ready-* && touch $@; fi

$(ARM_READY): | $(READY)
	@if ! command -v aarch64-linux-gnu-g++ >/dev/null; then \
		echo 'No compiler for ARM. On Debian or Ubuntu: apt-get install g++-aarch64-linux-gnu' >&2; \
	else \
		echo 'Building the runner for ARM …' && \
		rm -rf $(ARM)/wheel $(ARM)/ready-* && \
		$(UV) --quiet --no-deps --python-platform aarch64-manylinux_2_28 --only-binary :all: --constraints constraints.txt --target $(ARM)/sdk executorch && \
		_PYTHON_HOST_PLATFORM=linux-aarch64 $(BUILD_NATIVE) --config-setting build-dir='$(CURDIR)/$(ARM)' \
			--config-setting cmake.define.CMAKE_TOOLCHAIN_FILE='$(CURDIR)/runtime/native/cmake/aarch64-linux-gnu.cmake' \
			--config-setting cmake.define.executorch_ROOT='$(CURDIR)/$(ARM)/sdk/executorch' --out-dir $(ARM)/wheel runtime/native && \
		touch $@; fi
