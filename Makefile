# Everything a newcomer needs stands in `make help`. Nothing but Python, make and git is assumed.

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

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## Make .venv with the pinned dependencies

# A wheel of plain torch brings gigabytes of CUDA; the pinned version is what tests run with.
# DeepSpeed builds from source, looks for torch while it does, and compiles its operators only when
# a run asks for one.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "tita needs Python 3.11 to 3.13, not $$($(PYTHON) --version); say make PYTHON=python3.11" >&2; exit 2; }
	@echo "installing the pinned dependencies into $(VENV) (1.5 GB, some minutes)" >&2
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools wheel ninja
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt deepspeed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## Run the whole loop here: data, pairs, DPO, aligned answers, report
	$(BIN)/tita demo --out $(DEMO_OUT) $(DEMO_FLAGS)

demo-models: $(INSTALLED)  ## Train the demo's two tiny models again, from scratch
	$(BIN)/python -m tita.demo.pretrain

test: $(INSTALLED)  ## Run the tests (under ten minutes on two cores)
	$(BIN)/python -m pytest -m "not soak" -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_FLAGS)

soak: $(INSTALLED)  ## Run the long reliability tests
	$(BIN)/python -m pytest -m soak --timeout 7200 $(PYTEST_FLAGS)

lint: $(INSTALLED)  ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(INSTALLED)  ## Check types
	$(BIN)/mypy

bench: $(INSTALLED)  ## Run the benchmarks; each prints ratios measured side by side
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:  ## Remove what make made: .venv, caches, the demo's output
	rm -rf $(VENV) $(DEMO_OUT) .cache .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

-include charts/chart.mk
