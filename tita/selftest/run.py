"""A self-test from start to end: chooses models that fit, runs the checks, writes the result."""

import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tita.errors import NoDevice, TitaError
from tita.gang.gpus import require_gpus
from tita.json_text import dump_json
from tita.provenance import software
from tita.recipe_sources import parse_recipe_variable
from tita.recipes import SelftestRecipe, TrainRecipe, load_recipe
from tita.selftest.checks import Check, CheckFailed, CheckResult, Figures, NotHere, run_checks
from tita.selftest.decoding import Setting, checks_of_decoding
from tita.selftest.random_llava import BASE, REWARD, Size, random_llava
from tita.selftest.result_page import verdict, write_page
from tita.selftest.speed import SpeedSetting, checks_of_speed
from tita.selftest.training import BATCH, Workshop, checks_of_training
from tita.settings import settings
from tita.storage import open_store
from tita.storage.files import atomic_path
from tita.terminal import progress, say
from tita.train.memory import WorldSize, estimate_memory, model_shape
from tita.vlm.loading import silence_transformers

_PACKAGES = ("torch", "transformers", "trl", "deepspeed", "peft")
_TINY = {"image_side": 56, "num_words": 500, "vision_width": 64, "vision_layers": 1}
TINY_BASE = Size(width=128, mlp=256, layers=3, spread=0.08, **_TINY)
TINY_REWARD = Size(width=64, mlp=128, layers=2, spread=0.11, **_TINY)
MEDIUM_BASE = Size(width=768, mlp=2048, layers=12, spread=0.032)
MEDIUM_REWARD = Size(width=256, mlp=704, layers=6, spread=0.056)
LLAVA_7B = Size(
    width=4096, mlp=11008, layers=32, head_width=128, vision_width=1024, vision_layers=24
)
LLAVA_1B = Size(width=2048, mlp=5632, layers=22, vision_width=1024, vision_layers=24)
_HEADROOM = 1.5
"""Device memory needed relative to the weights: caches, activations and the prompt's logits."""


def run_selftest(out: Path, *, device: str | None, minutes: float | None) -> list[CheckResult]:
    """Run the checks that apply to this machine, and write `selftest.json` and `selftest.html`.

    Args:
        out: folder of the result.
        device: `cpu` or `cuda`; by default `cuda` if torch sees a GPU.
        minutes: checks that would end later are skipped, and the result says so. Default: 8, and 4
            on a processor.

    Returns:
        The results, in the order in which they ran.

    Raises:
        NoDevice: a GPU was asked for and there is none.
        TitaError: `out` is not a folder.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise NoDevice("torch sees no GPU", remedy="tita selftest --cpu checks the processor")
    if out.exists() and not out.is_dir():
        raise TitaError("not a folder", where=str(out), remedy="name another one")
    out.mkdir(parents=True, exist_ok=True)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    minutes = minutes or _DEFAULT_MINUTES[device]
    silence_transformers()
    if device == "cpu":
        # More threads are slower for models this small.
        torch.set_num_threads(1)
    machine = describe_machine(device)
    say(f"selftest: {machine['device']}, torch {torch.__version__}")
    results: list[CheckResult] = []
    with tempfile.TemporaryDirectory() as folder:
        checks = choose_checks(device, folder=Path(folder), short=minutes < _FULL_MINUTES)
        with progress("selftest", total=len(checks), unit="checks") as advance:
            for result in run_checks(checks, budget_s=60 * minutes):
                results.append(result)
                say(_line(result))
                # Written after each check: a driver that hangs leaves what was found before.
                _write(out, machine=machine, results=results)
                advance(note=result.name)
    write_page(out / "selftest.html", machine=machine, results=results)
    return results


_FULL_MINUTES = 5
_DEFAULT_MINUTES = {"cuda": 8.0, "cpu": 4.0}


def run_and_publish(
    out: Path | None = None, *, device: str | None = None, minutes: float | None = None
) -> bool:
    """Run the self-test with the recipe in `TITA_RECIPE`, and print the verdict.

    In a pod, the result is also pushed to the store as `selftests/<run>`.

    Args:
        out: folder of the result; default: `selftest-out`, in a pod on its scratch disk.
        device: as of `run_selftest`.
        minutes: overrides the recipe's.

    Returns:
        Whether a check failed.

    Raises:
        NoDevice: the pod holds GPUs, or one was asked for, and there is none.
    """
    environment = settings()
    recipe = load_recipe(SelftestRecipe, parse_recipe_variable(environment.recipe))
    require_gpus(environment)
    out = out or (environment.scratch_dir or Path()) / "selftest-out"
    results = run_selftest(out, device=device, minutes=minutes or recipe.minutes)
    where = str(out / "selftest.html")
    if environment.namespace is not None and environment.run is not None:
        store, tree = open_store(), f"selftests/{environment.run}"
        store.push_tree(out, tree, meta={"job": recipe.job, "run": environment.run})
        where = f"{store.uri}/{tree}"
    print(f"{verdict(results)} {where}", flush=True)
    return any(result.outcome == "failed" for result in results)


def choose_checks(device: str, *, folder: Path, short: bool) -> list[Check]:
    """All checks of a device, most important first.

    Args:
        folder: for the files of the training checks.
        short: the checks that take less than a minute on a CPU.
    """
    if device == "cpu":
        dtypes = (torch.float32, torch.bfloat16)
        setting = Setting(device=device, dtypes=dtypes, base=TINY_BASE, reward=TINY_REWARD)
        work = Workshop(folder, TINY_REWARD, 1 if short else 2)
        speed = SpeedSetting(
            device=device, dtype=torch.float32,
            base=TINY_BASE if short else BASE, reward=TINY_REWARD if short else REWARD,
            batches=(1, 8), num_tokens=16,
        )  # fmt: skip
        training = checks_of_training(work, dtypes=("float32",), short=short)
    else:
        setting = Setting(
            device=device, dtypes=(torch.float32, torch.bfloat16, torch.float16),
            base=MEDIUM_BASE, reward=MEDIUM_REWARD,
        )  # fmt: skip
        work = Workshop(folder, MEDIUM_REWARD, torch.cuda.device_count())
        base, reward = _largest_that_fits()
        speed = SpeedSetting(
            device=device, dtype=torch.bfloat16, base=base, reward=reward,
            batches=(1, 8, 32, 128), num_tokens=32,
        )  # fmt: skip
        training = checks_of_training(work, dtypes=("bfloat16", "float32"), short=short)
    memory = Check(
        name="memory",
        group="fits",
        about="peak memory of a training process is what tita's preflight predicts, or less",
        run=lambda: _check_memory(work, device),
        expected_s=30,
    )
    return [
        *checks_of_decoding(setting),
        training[0],
        *checks_of_speed(speed),
        *training[1:],
        memory,
    ]


def _largest_that_fits() -> tuple[Size, Size]:
    free, _ = torch.cuda.mem_get_info()
    for base, reward in ((LLAVA_7B, LLAVA_1B), (LLAVA_1B, MEDIUM_BASE)):
        if free > _HEADROOM * 2 * (base.num_parameters + reward.num_parameters):
            return base, reward
    return MEDIUM_BASE, MEDIUM_REWARD


def _check_memory(work: Workshop, device: str) -> Figures:
    """Of a run without checkpointing, whose logged peak is beside the prediction."""
    if device == "cpu":
        raise NotHere("peak memory is that of a GPU's allocator")
    work.train("memory", dtype="bfloat16")
    peak = max(step.peak_memory_bytes for step in work.progress("memory"))
    recipe = TrainRecipe(
        model=str(work.model), pairs="pairs", batch_size=BATCH, gradient_checkpointing=False
    )
    model = random_llava("reward", work.size, seed=3).model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    world = WorldSize(total=work.num_processes, local=work.num_processes)
    tokens = work.size.num_image_tokens + 12
    wanted = estimate_memory(recipe, shape=model_shape(model), world=world, tokens=tokens)
    figures = {"peak_gib": peak / 2**30, "predicted_gib": wanted.device / 2**30}
    if peak > 1.25 * wanted.device:
        raise CheckFailed(
            f"peak {figures['peak_gib']:.2f} GiB, predicted {figures['predicted_gib']:.2f} GiB"
        )
    return figures


def describe_machine(device: str) -> dict[str, Any]:
    """The device and the versions that matter for its results."""
    described: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "num_devices": 1,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **software(_PACKAGES),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        described |= {
            "device": properties.name,
            "num_devices": torch.cuda.device_count(),
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
        }
    return described


def _write(out: Path, *, machine: dict[str, Any], results: list[CheckResult]) -> None:
    body = {"machine": machine, "checks": [result.to_json() for result in results]}
    with atomic_path(out / "selftest.json") as temporary:
        temporary.write_text(dump_json(body, indent=1) + "\n")


def _line(result: CheckResult) -> str:
    detail = f": {result.detail}" if result.detail else ""
    return f"selftest: {result.outcome:7} {result.name} ({result.seconds:.1f} s){detail}"
