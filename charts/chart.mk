# The chart and the image.

CHART := charts/tita
HELM = $(shell $(PYTHON) charts/get_helm.py)/helm
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' tita/__init__.py)
IMAGE ?= tita:$(VERSION)
FLAVOUR ?= cuda
BUILD_FLAGS ?=
# The first that is there and answers: docker's client may be without its daemon.
ENGINE ?= $(shell for engine in docker podman buildah; do \
  $$engine info >/dev/null 2>&1 && { echo $$engine; break; }; done)

.PHONY: chart chart-readme image image-check

chart: $(INSTALLED)  ## Lint the chart, render it, test every value
	@for values in $(CHART)/ci/*.yaml; do $(HELM) lint --strict $(CHART) --values $$values || exit 1; done
	$(BIN)/python charts/write_readme.py --check
	$(BIN)/python -m pytest tests/chart

chart-readme: $(INSTALLED)  ## Write the chart's README from the comments in values.yaml
	$(BIN)/python charts/write_readme.py

image:  ## Build the image with docker, podman or buildah; FLAVOUR=cpu for torch's CPU build
	@test -n "$(ENGINE)" || { echo "no docker, podman or buildah answers; name one: make image ENGINE=..." >&2; exit 2; }
	$(ENGINE) build $(BUILD_FLAGS) --tag $(IMAGE) --build-arg FLAVOUR=$(FLAVOUR) \
	  --build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD) .

image-check: $(INSTALLED)  ## Build the image on a base made here, and run it (root, buildah, 20 min; or FLAVOUR=cuda)
	$(BIN)/python -m pytest -m soak tests/image --timeout 7200
