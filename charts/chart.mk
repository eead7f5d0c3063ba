# The Helm chart and the container image.

CHART := charts/tita
HELM = $(shell $(PYTHON) charts/get_helm.py)/helm
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' tita/__init__.py)
IMAGE ?= tita:$(VERSION)
FLAVOUR ?= cuda
BUILD_FLAGS ?=
# With a keyring (binary, with the secret key), the chart is signed by the key whose name contains CHART_KEY.
CHART_KEYRING ?=
CHART_KEY ?= tita
CHART_PACKAGES ?= build/chart
# The first engine that responds: a docker client may have no daemon.
ENGINE ?= $(shell for engine in docker podman buildah; do \
  $$engine info >/dev/null 2>&1 && { echo $$engine; break; }; done)

.PHONY: chart chart-package chart-readme image image-check

chart: $(INSTALLED)  ## Lint, render and test the chart
	@for values in $(CHART)/ci/*.yaml; do $(HELM) lint --strict $(CHART) --values $$values || exit 1; done
	$(BIN)/python charts/write_readme.py --check
	$(BIN)/python -m pytest tests/chart

# readme-generator-for-helm is not used: it shows every default that is an object as {}, and its schema has
# neither enums, patterns, conditions nor additionalProperties. values.schema.json is maintained by hand.
chart-readme: $(INSTALLED)  ## Update the values tables in the chart's README from values.yaml
	$(BIN)/python charts/write_readme.py

chart-package:  ## Package the chart in CHART_PACKAGES; with CHART_KEYRING signed, with a provenance file
	$(HELM) package $(CHART) --destination $(CHART_PACKAGES) \
	  $(if $(CHART_KEYRING),--sign --key '$(CHART_KEY)' --keyring '$(CHART_KEYRING)')

image:  ## Build the container image; FLAVOUR=cpu for CPU-only PyTorch
	@test -n "$(ENGINE)" || { echo "found no running docker, podman or buildah; set ENGINE, for example make image ENGINE=podman" >&2; exit 2; }
	$(ENGINE) build $(BUILD_FLAGS) --tag $(IMAGE) --build-arg FLAVOUR=$(FLAVOUR) \
	  --build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD) .

image-check: $(INSTALLED)  ## Build the image on a local base image and test it (root, buildah; 20 min)
	$(BIN)/python -m pytest -m soak tests/image --timeout 7200
