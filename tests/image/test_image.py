"""Builds the image with `make image` and runs the commands of pods in it.

Requires root, buildah and debootstrap, but no container engine or registry: the base image is built
locally. Layers stay in buildah's cache, so a second run takes a
minute. FLAVOUR=cuda tests the GPU image (11 GB, of 40 GB free space); building it needs no GPU.
"""

import os
import re
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
    """Debian with its Python."""
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
    """Run `make image` with this machine's CA certificates, and its wheels of PyTorch for CPUs."""
    # Not the digest of the Dockerfile, which a base image that is built here does not have.
    flags = ["--isolation=chroot", "--layers", "--pull-never", f"--build-arg=BASE_IMAGE={BASE}"]
    flags += [f"--volume={CERTIFICATES}:{CERTIFICATES}:ro"]
    configuration = scratch / "pip.conf"
    lines = ["[global]", f"cert = {CERTIFICATES}/ca-certificates.crt"]
    wheels = os.environ.get("PIP_FIND_LINKS")
    # pip would take PyTorch for CPUs from there into the GPU image, too.
    if wheels and FLAVOUR == "cpu":
        lines += [f"find-links = {wheels}"]
        flags += [f"--volume={wheels}:{wheels}:ro", f"--build-arg=TORCH_CPU_WHEELS={wheels}"]
    configuration.write_text("\n".join(lines) + "\n")
    flags += [f"--volume={configuration}:/etc/pip.conf:ro"]
    make = ["make", "image", "ENGINE=buildah", f"IMAGE={IMAGE}", f"FLAVOUR={FLAVOUR}"]
    return run(*make, f"BUILD_FLAGS={' '.join(flags)}", cwd=source)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of the repository that tests may change."""
    folder = tmp_path_factory.mktemp("clone") / "tita"
    run("git", "clone", "--quiet", ROOT, folder)
    return folder


@pytest.fixture(scope="session")
def container(base: str, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A container of the new image."""
    build(source, tmp_path_factory.mktemp("build"))
    name = run("buildah", "from", "--pull-never", IMAGE).strip()
    yield name
    run("buildah", "rm", name)


def inside(container: str, *command: str) -> str:
    return run("buildah", "run", "--isolation=chroot", container, "--", *command)


def test_the_entry_point_is_tita(container: str) -> None:
    output = run("buildah", "inspect", "--format", "{{.OCIv1.Config.Entrypoint}}", container)
    assert output.strip() == "[tita]"
    assert inside(container, "tita", "--version").startswith("tita ")
    for command in ("train-dpo", "build-pairs", "benchmark", "serve"):
        assert "Usage" in inside(container, "tita", command, "--help")


def test_the_image_has_oci_labels(container: str) -> None:
    labels = run("buildah", "inspect", "--format", "{{.OCIv1.Config.Labels}}", container)
    for name in ("title", "version", "revision", "licenses"):
        assert f"org.opencontainers.image.{name}:" in labels
    assert ":unknown" not in labels


def test_the_user_is_unprivileged_and_there_is_no_compiler(container: str) -> None:
    assert inside(container, "id", "-u").strip() == "10001"
    assert inside(container, "python", "-c", "import getpass; print(getpass.getuser())") == "tita\n"
    # One name each: Debian's sh reads no further.
    search = "for name in gcc g++ cc make ninja; do command -v $name; done || true"
    compilers = inside(container, "sh", "-c", search)
    # Triton, a dependency of PyTorch for GPUs, needs a compiler; vLLM requires ninja.
    for_gpus = ["/usr/bin/gcc", "/usr/bin/cc", "/opt/tita/bin/ninja"]
    assert compilers.split() == ([] if FLAVOUR == "cpu" else for_gpus)
    writable = "find /opt /usr /etc -writable -not -type l -print -quit"
    assert inside(container, "sh", "-c", f"{writable} 2>/dev/null || true") == ""


def test_the_cpu_optimizer_needs_no_compiler(container: str) -> None:
    program = (
        "import torch\n"
        "from deepspeed.ops.adam import DeepSpeedCPUAdam\n"
        "weight = torch.nn.Parameter(torch.ones(64))\n"
        "optimizer = DeepSpeedCPUAdam([weight], lr=0.1)\n"
        "weight.grad = torch.ones(64)\n"
        "optimizer.step()\n"
        "print('stepped to', round(weight[0].item(), 3))\n"
    )
    # Without a GPU, DeepSpeed would otherwise select another accelerator and ignore its operators.
    accelerator = f"DS_ACCELERATOR={FLAVOUR}"
    assert "stepped to 0.9" in inside(container, "env", accelerator, "python", "-c", program)


def test_pytorch_is_built_for_the_flavour(container: str) -> None:
    said = inside(container, "python", "-c", "import torch; print('CUDA', torch.version.cuda)")
    assert ("CUDA None" in said) == (FLAVOUR == "cpu"), said


@pytest.mark.skipif(FLAVOUR == "cpu", reason="the CPU build of PyTorch does not include Triton")
def test_triton_compiles_its_driver_stub(container: str) -> None:
    """On a GPU node the driver library comes from the host; here it is an empty stub."""
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


def test_the_gpu_image_has_both_engines(container: str) -> None:
    options = ("serve", "--base=/nowhere", "--engine=vllm", "--port=0")
    program = "import subprocess, sys; done = subprocess.run(['tita', *sys.argv[1:]], text=True, "
    program += "capture_output=True); print(done.returncode, done.stderr)"
    said = inside(container, "python", "-c", program, *options)
    assert said.startswith("2 ")
    assert ("engine vllm is not installed" in said) == (FLAVOUR == "cpu")


def test_the_packages_fit_together(container: str) -> None:
    assert "No broken requirements found" in inside(container, "pip", "check")


@pytest.mark.skipif(FLAVOUR == "cpu", reason="the CPU flavour has no vLLM")
def test_the_combined_models_fit_the_vllm_of_the_image(container: str) -> None:
    """Its build for CUDA has other modules than the one for CPUs that the engine's tests run."""
    program = (
        "from tita.vllm_plugin import guided_models, logits_processors, model_state\n"
        "from tita.vllm_plugin.families import FAMILIES, guided_name\n"
        "models = [getattr(guided_models, guided_name(each)) for each in FAMILIES.values()]\n"
        "print('combined models:', len(models), 'of', len(FAMILIES))\n"
    )
    said = inside(container, "python", "-c", program)
    assert re.search(r"combined models: (\d+) of \1$", said, re.MULTILINE), said


def test_the_demo_runs_and_trains(container: str) -> None:
    inside(container, "tita", "demo", "--quick", "--out", "/tmp/demo-out")
    assert "report.html" in inside(container, "ls", "/tmp/demo-out")


def test_a_code_change_rebuilds_in_seconds(container: str, source: Path, tmp_path: Path) -> None:
    package = source / "tita" / "__init__.py"
    package.write_text(package.read_text() + "\n# changed\n")
    # Commits differ in what the image is labelled with, too.
    author = ("-c", "user.name=tita", "-c", "user.email=tita@example.com")
    run("git", *author, "commit", "--quiet", "--all", "--message", "change", cwd=source)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = build(source, tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Using cache" in output
    assert "pip install --no-build-isolation" not in output.split("Using cache")[-1]
    # CPU time does not depend on the load of the machine.
    took_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # buildah reads the packages to look for them in its cache; those of the GPU image are 10 GB.
    assert took_s < (60 if FLAVOUR == "cpu" else 300), f"{took_s:.0f} s"
    print(f"rebuilt in {took_s:.0f} s of CPU time")
