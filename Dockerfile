# The image of every pod: workers, inference server, benchmark. `make image` builds it.
#
# BASE_IMAGE can be any Debian-based image with Python 3.11 or 3.12, venv and headers; CUDA is included
# in the PyTorch wheels. FLAVOUR=cuda has both inference engines, transformers and vLLM. FLAVOUR=cpu installs
# CPU-only PyTorch and no vLLM, for tests and clusters without GPUs.
# The tag is for readers; `docker buildx imagetools inspect python:3.11-slim-bookworm` prints its newest digest.
ARG BASE_IMAGE=python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

# Extracts the requirements from pyproject.toml, so that other changes to that file, such as lint rules,
# do not invalidate the dependency layer below.
FROM ${BASE_IMAGE} AS requirements
ARG FLAVOUR=cuda
# Experiment trackers to install; the chart's value `image.trackers` names them.
ARG TRACKERS=mlflow,tensorboard,wandb
WORKDIR /src
COPY pyproject.toml .
RUN FLAVOUR=$FLAVOUR TRACKERS=$TRACKERS python3 -c "import os, tomllib; \
project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = {'tensorboard': []} | project['optional-dependencies']; \
trackers = [line for name in os.environ['TRACKERS'].split(',') if name for line in extras[name]]; \
engines = [] if os.environ['FLAVOUR'] == 'cpu' else [line for line in extras['vllm'] if line != 'tita[ml]']; \
print(*project['dependencies'], *extras['ml'], *engines, *trackers, sep='\n')" > requirements.txt

FROM ${BASE_IMAGE} AS dependencies
ARG FLAVOUR=cuda
ARG TORCH_CPU_WHEELS=https://download.pytorch.org/whl/cpu/torch/
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt constraints-cuda.txt ./
RUN if [ "$FLAVOUR" != cpu ]; then mv constraints-cuda.txt constraints.txt; fi \
 && python3 -m venv /opt/tita
ENV PATH=/opt/tita/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ "$FLAVOUR" = cpu ]; then \
      pip install --no-deps --no-index --find-links "$TORCH_CPU_WHEELS" --constraint constraints.txt torch; \
    fi \
 && pip install --constraint constraints.txt torch setuptools wheel ninja
# Builds the DeepSpeed operators that would otherwise be compiled at first use in every pod, which takes
# three minutes and needs a compiler: the CPU optimizer (offloading) and the shared-memory collectives
# (ranks without GPUs). DeepSpeed passes -march=native; the wrapper overrides it with x86-64-v3 (AVX2)
# or ARMv8.
RUN case "$(uname -m)" in \
      x86_64) flags="-march=x86-64-v3 -U__AVX512__ -D__AVX256__" ;; \
      *) flags="-march=armv8-a -U__SVE__ -D__NEON__" ;; \
    esac \
 && printf '#!/bin/sh\nexec g++ "$@" %s\n' "$flags" > /usr/local/bin/portable-g++ \
 && chmod +x /usr/local/bin/portable-g++
RUN --mount=type=cache,target=/root/.cache/pip \
    CXX=portable-g++ CC=portable-g++ DS_ACCELERATOR=$FLAVOUR \
    DS_BUILD_OPS=0 DS_BUILD_CPU_ADAM=1 DS_BUILD_SHM_COMM=1 \
    pip install --no-build-isolation --no-cache-dir --constraint constraints.txt deepspeed
COPY --from=requirements /src/requirements.txt .
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt --requirement requirements.txt \
 && if [ "$FLAVOUR" != cpu ]; then pip install --constraint constraints.txt --no-deps bitsandbytes; fi \
 && if [ "$FLAVOUR" = cpu ]; then pip uninstall --yes ninja; fi \
 && pip uninstall --yes wheel

FROM ${BASE_IMAGE} AS package
WORKDIR /src
RUN python3 -m venv /opt/build
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY charts charts
COPY jobs jobs
COPY tita tita
RUN --mount=type=cache,target=/root/.cache/pip \
    PIP_CONSTRAINT=constraints.txt /opt/build/bin/pip wheel --no-deps --wheel-dir /dist .

FROM ${BASE_IMAGE}
ARG FLAVOUR=cuda
# libgomp: the DeepSpeed operators use OpenMP. gcc: on GPUs TRL and vLLM use Triton, which compiles its
# driver stub at run time. The user has a name because getpass requires one.
RUN apt-get update \
 && if [ "$FLAVOUR" = cpu ]; then compiler=; else compiler="gcc libc6-dev"; fi \
 && apt-get install --yes --no-install-recommends libgomp1 $compiler \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home tita
COPY --from=dependencies /opt/tita /opt/tita
# After the large layers, which an argument that changes with every commit would have built again, and before
# a RUN: buildah would otherwise take the labels of the last build from its cache.
ARG VERSION=unknown
ARG REVISION=unknown
RUN --mount=type=bind,from=package,source=/dist,target=/dist \
    /opt/tita/bin/pip install --no-cache-dir --no-index --no-deps /dist/*.whl
LABEL org.opencontainers.image.title=tita \
      org.opencontainers.image.description="Token-level inference-time alignment for vision-language models" \
      org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$REVISION
# USER gives getpass a name if the pod runs with another uid.
ENV PATH=/opt/tita/bin:$PATH \
    TITA_REVISION=$REVISION \
    USER=tita \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /home/tita
ENTRYPOINT ["tita"]
