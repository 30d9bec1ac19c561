# `make demo`, `make test` and `make check` each set up .venv by themselves; PYTHON=... chooses the interpreter.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test check docs results lock clean

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell \
	$(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(p))))
BIN := .venv/bin
READY := .venv/.ready
PIP_FLAGS := -q --disable-pip-version-check

help:
	@echo "make demo    quantize, register and generate 256 molecules on this machine"
	@echo "make test    every test (those marked gpu are skipped without a CUDA device)"
	@echo "make check   ruff, mypy and the layering rules"
	@echo "make docs    make docs/spec.md again from the schema of the spec"
	@echo "make results fill the result tables of README.md and docs/ from benchmarks/results"
	@echo "make lock    rebuild requirements.lock from the newest versions that pyproject.toml allows"
	@echo "make clean   remove what the other targets made"

# The build runs in .venv itself: an isolated build would fetch a setuptools that nothing pins.
$(READY): pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or name it with make PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "installing into .venv (about 2.7 GB, a few minutes the first time)"
	@$(BIN)/python -m pip install $(PIP_FLAGS) -c requirements.lock setuptools
	@$(BIN)/python -m pip install $(PIP_FLAGS) -c requirements.lock --no-build-isolation -e '.[dev,server]'
	@touch $@

demo: $(READY)
	$(BIN)/bitdgdm demo

test: $(READY)
	$(BIN)/python -m pytest

# mypy finds the floors as bitdgdm.<floor> through a link that git ignores; it runs beside it because from
# the root it would take bitdgdm.py for the whole package.
check: $(READY)
	$(BIN)/ruff check .
	@mkdir -p .mypy && ln -sfn .. .mypy/bitdgdm
	cd .mypy && ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache $(addprefix -p bitdgdm.,infra kernels quant models tasks pipelines)
	$(BIN)/python -m pytest tests/test_layering.py -q

docs: $(READY)
	$(BIN)/python -m bitdgdm.pipelines.spec_reference > docs/spec.md.new
	mv docs/spec.md.new docs/spec.md

results: $(READY)
	$(BIN)/python benchmarks/results.py

lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install $(PIP_FLAGS) setuptools
	.venv-lock/bin/python -m pip install $(PIP_FLAGS) --no-build-isolation -e '.[dev,server]'
	{ sed -n '/^#/p' requirements.lock; .venv-lock/bin/python -m pip freeze --all --exclude pip --exclude-editable \
		| sed 's/+[a-z0-9.]*$$//' | grep -vP '^(nvidia-(?!cuda-nvdisasm)|cuda-(?!toolkit)|triton==)' ; } > requirements.lock.new
	mv requirements.lock.new requirements.lock && rm -rf .venv-lock

clean:
	rm -rf .venv .venv-lock .mypy .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info demo-out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
