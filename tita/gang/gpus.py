"""Checks that the GPUs that a pod holds are usable: a job must not run on the CPU by accident."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

from tita.errors import NoDevice
from tita.settings import Settings
from tita.terminal import counted

# Values of NVIDIA_VISIBLE_DEVICES that name no device; images set `all`, with and without GPUs.
_NO_DEVICES = ("", "all", "none", "void")


def require_gpus(settings: Settings, *, allow_cpu: bool = False) -> None:
    """Check that PyTorch finds the GPUs that this pod holds. Loads torch only if it holds any.

    Args:
        settings: `gpus` is what the chart requested; without it, the devices that the container
            runtime assigned count.
        allow_cpu: permits that there is none; so does `allow_cpu` of the settings.

    Raises:
        NoDevice: PyTorch finds fewer.
    """
    held = _assigned_gpus() if settings.gpus is None else settings.gpus
    if held == 0:
        return
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found >= held or (found == 0 and (allow_cpu or settings.allow_cpu)):
        return
    what = f"only {found}" if found else "none"
    raise NoDevice(
        f"this pod holds {counted(held, 'GPU')} and PyTorch finds {what} ({_versions()})",
        remedy="update the node's driver or choose another image (docs/gpus.md); "
        "allow_cpu=true permits the CPU",
    )


def _assigned_gpus() -> int:
    """GPUs that NVIDIA's container runtime assigned to this container by name."""
    names = os.environ.get("NVIDIA_VISIBLE_DEVICES", "")
    return 0 if names in _NO_DEVICES else len(names.split(","))


def _versions() -> str:
    """Versions of the driver and of CUDA, and why CUDA does not start, where known."""
    import torch

    driver = "no NVIDIA driver"
    with suppress(OSError):
        # NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024
        line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
        driver = (
            f"driver {next(word for word in line.split() if word[0].isdigit() and '.' in word)}"
        )
    if (supported := _driver_cuda()) is not None:
        driver += f", which supports CUDA {supported}"
    built = torch.version.cuda or torch.version.hip
    facts = [
        driver,
        f"PyTorch {torch.__version__} built for {f'CUDA {built}' if built else 'CPUs'}",
    ]
    if built:
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except (RuntimeError, AssertionError) as error:
            facts.append((str(error).splitlines() or [type(error).__name__])[0])
    return "; ".join(facts)


def _driver_cuda() -> str | None:
    """The highest CUDA version that the driver's library supports; None without one."""
    # https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__VERSION.html
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else f"{version.value // 1000}.{version.value % 1000 // 10}"
