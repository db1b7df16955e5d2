# Everything starts here: `make help`.
# The lock holds the whole stack, so it is installed as it stands, without resolving.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
HALF := $(VENV)/.installing
export PATH := $(CURDIR)/$(BIN):$(PATH)

# Tests of one process each go two at a time; the others start ranks, which want the cores for themselves.
ALONE := tests/unit tests/cli
define pytest
$(BIN)/python -m pytest $(1) -n 2 --dist loadfile $(ALONE)
$(BIN)/python -m pytest $(1) $(ALONE:%=--ignore=%)
endef

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint types bench docs-check lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## .venv with the locked stack and this package (done by the other targets)

$(STAMP): requirements/cpu.txt setup.py .python-version
	@sh tools/find_python.sh >/dev/null
	@# an installation that was cut off says that packages are there whose files are not
	@test ! -e $(HALF) && $(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null \
		|| "$$(sh tools/find_python.sh)" -m venv --clear $(VENV)
	@touch $(HALF)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements/cpu.txt)"
	@echo "installing the locked stack into $(VENV) (about 7 GB)"
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --no-deps --compile-bytecode -r requirements/cpu.txt
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --no-deps --no-build-isolation -e .
	@rm $(HALF)
	@touch $@

demo: $(STAMP)  ## the whole road in miniature on this machine (a quarter of an hour on two cores)
	$(BIN)/octo pipeline recipes/miniature.py

test: $(STAMP) lint types  ## what CI runs
	$(call pytest,-m "not slow")

test-all: $(STAMP) lint types  ## full counts and slow tiers too
	$(call pytest,)

lint: $(STAMP)  ## style and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)  ## mypy
	$(BIN)/mypy

bench: $(STAMP)  ## every benchmark that runs on a CPU and asks for no files; JSON on stdout
	@for script in $(filter-out benchmarks/tokenization.py benchmarks/gpu_train.py,$(wildcard benchmarks/*.py)); do \
		$(BIN)/python $$script || exit 1; done

docs-check: $(STAMP)  ## the commands of README and docs
	$(BIN)/python -m pytest tests/cli/test_documents.py

lock: $(STAMP)  ## resolve requirements/*.in again
	$(BIN)/uv pip compile requirements/cpu.in --overrides requirements/overrides.txt --python-version 3.12 \
		--no-annotate --no-emit-index-url --custom-compile-command "make lock" -q -o requirements/cpu.txt
	$(BIN)/uv pip compile requirements/gpu.in --overrides requirements/overrides-gpu.txt --python-version 3.12 \
		--no-annotate --no-emit-index-url --custom-compile-command "make lock" -q -o requirements/gpu.txt

clean:  ## remove .venv and caches (never runs/)
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
