# `make help` lists the targets. Requires Python 3.11 to 3.13, make and git. The tests of the chart also need npm
# and are skipped without it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_OUT ?= demo-out
DEMO_FLAGS ?=
PYTEST_FLAGS ?=
TEST_PROCESSES ?= 2

.DEFAULT_GOAL := help
.PHONY: help install demo demo-models test soak lint type bench clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## Create .venv with the pinned dependencies

# DeepSpeed is built from source and imports torch during the build, so torch is installed first.
# DS_BUILD_OPS=0: operators are compiled at first use.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "tita needs Python 3.11 to 3.13, but $(PYTHON) is $$($(PYTHON) --version); run make PYTHON=python3.11" >&2; exit 2; }
	@echo "installing the pinned dependencies into $(VENV) (1.5 GB, several minutes)" >&2
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools wheel ninja
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt deepspeed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## Run the whole loop locally: data, pairs, DPO, aligned inference, report
	$(BIN)/tita demo --out $(DEMO_OUT) $(DEMO_FLAGS)

demo-models: $(INSTALLED)  ## Retrain the two tiny models of the demo from scratch
	$(BIN)/python -m tita.demo.pretrain

test: $(INSTALLED)  ## Run the tests (less than 10 minutes on two cores)
	$(BIN)/python -m pytest -m "not soak" -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_FLAGS)

soak: $(INSTALLED)  ## Run the long-running reliability tests
	$(BIN)/python -m pytest -m soak --timeout 7200 $(PYTEST_FLAGS)

lint: $(INSTALLED)  ## Check style and formatting with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(INSTALLED)  ## Check types with mypy
	$(BIN)/mypy

bench: $(INSTALLED)  ## Run the benchmarks, which print ratios measured in the same run
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:  ## Delete .venv, caches and the output of the demo
	rm -rf $(VENV) $(DEMO_OUT) .cache .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

-include charts/chart.mk
