"""The image is really built, by `make image`, and what pods do runs in it.

Needs root, buildah and debootstrap, no container engine and no registry: the base is made here and
named like the real one. Layers stay in buildah's cache, so a second run takes a minute.
FLAVOUR=cuda looks at the image for GPUs instead, 6 GB; it needs none to be built.
"""

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASE = "docker.io/library/python:3.11-slim-bookworm"
FLAVOUR = os.environ.get("FLAVOUR", "cpu")
IMAGE = f"tita:check-{FLAVOUR}"
CERTIFICATES = Path("/etc/ssl/certs")

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(os.geteuid() != 0, reason="buildah's chroot isolation needs root"),
    pytest.mark.skipif(
        not (shutil.which("buildah") and shutil.which("debootstrap")),
        reason="needs buildah and debootstrap: apt-get install buildah debootstrap",
    ),
]


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Debian with its own Python, under the name of the Dockerfile's base."""
    known = subprocess.run(["buildah", "inspect", "--type", "image", BASE], capture_output=True)
    if known.returncode != 0:
        rootfs = tmp_path_factory.mktemp("base") / "rootfs"
        packages = "python3,python3-venv,python3-dev,python-is-python3,ca-certificates"
        run("debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", rootfs)
        container = run("buildah", "from", "scratch").strip()
        run("buildah", "copy", "--quiet", container, rootfs, "/")
        run("buildah", "commit", "--quiet", "--rm", container, BASE)
    return BASE


def build(source: Path, scratch: Path) -> str:
    """`make image` with what this machine tells pip: certificates, and where wheels lie."""
    flags = ["--isolation=chroot", "--layers", "--pull-never"]
    flags += [f"--volume={CERTIFICATES}:{CERTIFICATES}:ro"]
    configuration = scratch / "pip.conf"
    lines = ["[global]", f"cert = {CERTIFICATES}/ca-certificates.crt"]
    if wheels := os.environ.get("PIP_FIND_LINKS"):
        lines += [f"find-links = {wheels}"]
        flags += [f"--volume={wheels}:{wheels}:ro", f"--build-arg=TORCH_CPU_WHEELS={wheels}"]
    configuration.write_text("\n".join(lines) + "\n")
    flags += [f"--volume={configuration}:/etc/pip.conf:ro"]
    make = ["make", "image", "ENGINE=buildah", f"IMAGE={IMAGE}", f"FLAVOUR={FLAVOUR}"]
    return run(*make, f"BUILD_FLAGS={' '.join(flags)}", cwd=source)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone, which a test may change."""
    folder = tmp_path_factory.mktemp("clone") / "tita"
    run("git", "clone", "--quiet", ROOT, folder)
    return folder


@pytest.fixture(scope="session")
def container(base: str, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A container of the image just built."""
    build(source, tmp_path_factory.mktemp("build"))
    name = run("buildah", "from", "--pull-never", IMAGE).strip()
    yield name
    run("buildah", "rm", name)


def inside(container: str, *command: str) -> str:
    return run("buildah", "run", "--isolation=chroot", container, "--", *command)


def test_the_entry_point_is_tita(container: str) -> None:
    said = run("buildah", "inspect", "--format", "{{.OCIv1.Config.Entrypoint}}", container)
    assert said.strip() == "[tita]"
    assert inside(container, "tita", "--version").startswith("tita ")
    for command in ("train-dpo", "build-pairs", "benchmark", "serve"):
        assert "Usage" in inside(container, "tita", command, "--help")


def test_it_says_what_it_is(container: str) -> None:
    labels = run("buildah", "inspect", "--format", "{{.OCIv1.Config.Labels}}", container)
    for name in ("title", "version", "revision", "licenses"):
        assert f"org.opencontainers.image.{name}:" in labels
    assert ":unknown" not in labels


def test_it_runs_as_nobody_special_and_builds_nothing(container: str) -> None:
    assert inside(container, "id", "-u").strip() == "10001"
    assert inside(container, "python", "-c", "import getpass; print(getpass.getuser())") == "tita\n"
    compilers = inside(container, "sh", "-c", "command -v gcc g++ cc make ninja || true")
    # Triton, which torch for GPUs brings along, needs one.
    assert compilers.split() == ([] if FLAVOUR == "cpu" else ["/usr/bin/gcc", "/usr/bin/cc"])
    writable = "find /opt /usr /etc -writable -not -type l -print -quit"
    assert inside(container, "sh", "-c", f"{writable} 2>/dev/null || true") == ""


def test_offloading_needs_no_compiler(container: str) -> None:
    program = (
        "import torch\n"
        "from deepspeed.ops.adam import DeepSpeedCPUAdam\n"
        "weight = torch.nn.Parameter(torch.ones(64))\n"
        "optimizer = DeepSpeedCPUAdam([weight], lr=0.1)\n"
        "weight.grad = torch.ones(64)\n"
        "optimizer.step()\n"
        "print('stepped to', round(weight[0].item(), 3))\n"
    )
    # Where no GPU is seen, DeepSpeed takes its own ops for those of another accelerator.
    accelerator = f"DS_ACCELERATOR={FLAVOUR}"
    assert "stepped to 0.9" in inside(container, "env", accelerator, "python", "-c", program)


@pytest.mark.skipif(FLAVOUR == "cpu", reason="Triton is there with torch for GPUs only")
def test_triton_can_compile_its_way_to_the_driver(container: str) -> None:
    """As on a node with GPUs, where the driver's library comes from the host; here it is empty."""
    program = (
        "import pathlib, subprocess, tempfile\n"
        "from triton.backends.nvidia import driver\n"
        "from triton.runtime.build import _build\n"
        "folder = tempfile.mkdtemp()\n"
        "stub = f'{folder}/libcuda.so.1'\n"
        "subprocess.run(['gcc', '-shared', '-o', stub, '-xc', '/dev/null'], check=True)\n"
        "source = str(pathlib.Path(driver.dirname, 'driver.c'))\n"
        "print(_build('cuda_utils', source, folder, [folder], driver.include_dirs,\n"
        "             driver.libraries, []))\n"
    )
    assert "cuda_utils" in inside(container, "python", "-c", program)


def test_the_demo_runs_and_trains(container: str) -> None:
    inside(container, "tita", "demo", "--quick", "--out", "/tmp/demo-out")
    assert "report.html" in inside(container, "ls", "/tmp/demo-out")


def test_a_change_of_code_rebuilds_in_seconds(container: str, source: Path, tmp_path: Path) -> None:
    package = source / "tita" / "__init__.py"
    package.write_text(package.read_text() + "\n# changed\n")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = build(source, tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Using cache" in said
    assert "pip install --no-build-isolation" not in said.split("Using cache")[-1]
    # Of processor time, which does not hang on what else this machine does.
    took_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert took_s < 60, f"{took_s:.0f} s"
    print(f"rebuilt in {took_s:.0f} s of processor time")
