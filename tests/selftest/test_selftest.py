"""The self-test passes on this machine, and names the check that a planted fault breaks."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from tita.align import Engine, Request
from tita.align.kv_cache import KVLayer
from tita.cli.main import tita
from tita.errors import ExitCode
from tita.selftest import decoding, run
from tita.selftest.checks import Check, CheckFailed, NotHere, run_checks
from tita.selftest.decoding import Setting, checks_of_decoding
from tita.selftest.run import TINY_BASE, TINY_REWARD
from tita.selftest.training import Workshop, checks_of_training
from tita.settings import Settings
from tita.storage import locate, open_store

SETTING = Setting(device="cpu", dtypes=(torch.float32,), base=TINY_BASE, reward=TINY_REWARD)

WITHOUT_HURRY = """
from tita.cli.main import tita
from tita.selftest import run
run._FULL_MINUTES = 60
tita()
"""


def outcomes(checks: Sequence[Check]) -> dict[str, str]:
    return {result.name: result.outcome for result in run_checks(checks, budget_s=600)}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_command_checks_this_machine(tmp_path: Path) -> None:
    out = tmp_path / "out"
    # The short form, which is the default, and time for all of it on a busy machine.
    assert run._DEFAULT_MINUTES["cpu"] < run._FULL_MINUTES
    command = [sys.executable, "-c", WITHOUT_HURRY, "selftest", "--cpu", "--minutes", "30"]
    done = subprocess.run(
        [*command, "--out", out], capture_output=True, text=True, timeout=550, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "selftest.json").read_text())
    by_outcome: dict[str, set[str]] = {}
    for check in found["checks"]:
        by_outcome.setdefault(check["outcome"], set()).add(check["name"])
    assert by_outcome.keys() == {"passed", "skipped"}
    # What a machine without a GPU cannot check.
    assert by_outcome["skipped"] == {"quantized-4bit", "quantized-8bit", "device-map", "memory"}
    assert {"guidance-bfloat16", "train-zero2-float32", "decode-batch-8"} <= by_outcome["passed"]
    assert found["machine"]["packages"]["torch"] == torch.__version__
    assert "fewer than two GPUs" in (out / "selftest.html").read_text()
    assert "Skipped: quantized-4bit" in done.stdout


def test_command_refuses_what_cannot_be_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit) as caught:
            tita(["selftest", "--gpu", "--out", str(tmp_path)])
        assert caught.value.code == ExitCode.NO_DEVICE
        assert "tita selftest --cpu" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        tita(["selftest", "--cpu", "--out", str(tmp_path / "file")])
    assert caught.value.code == ExitCode.USER


@pytest.mark.parametrize("fails", [False, True])
def test_job_pushes_its_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: bool
) -> None:
    def check() -> dict[str, float]:
        if fails:
            raise CheckFailed("2, not 1")
        return {"x": 1}

    one = Check(name="one", group="right", about="", run=check)
    monkeypatch.setattr(run, "choose_checks", lambda *_, **__: [one])
    environment = Settings(
        store=str(tmp_path / "store"), namespace="ml", run="selftest-1", recipe='{"minutes": 1}',
        scratch_dir=tmp_path,
    )  # fmt: skip
    for module in (run, locate):
        monkeypatch.setattr(module, "settings", lambda: environment)
    assert run.run_and_publish(device="cpu") is fails
    store = open_store(str(tmp_path / "store"))
    (found,) = json.loads((store.pull_tree("selftests/selftest-1") / "selftest.json").read_text())[
        "checks"
    ]
    assert found["outcome"] == ("failed" if fails else "passed")


def faulty(change: Callable[[Request], Request]) -> type[Engine]:
    """An engine that changes every request."""

    class Faulty(Engine):
        def generate(self, requests: Sequence[Request], **options: Any) -> Any:
            return super().generate([change(each) for each in requests], **options)

    return Faulty


def heavier(request: Request) -> Request:
    guidance = dataclasses.replace(request.guidance, weight=1.02 * request.guidance.weight)
    return dataclasses.replace(request, guidance=guidance)


def without_image(request: Request) -> Request:
    return dataclasses.replace(request, images=(PIL.Image.new("RGB", (56, 56)),))


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        (heavier, {"guidance-float32"}),
        (without_image, {"guidance-float32", "image", "weight-0"}),
    ],
)
def test_wrong_request_is_found(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Request], Request], broken: set[str]
) -> None:
    monkeypatch.setattr(decoding, "Engine", faulty(change))
    names = ("guidance-float32", "image", "weight-0")
    found = outcomes([check for check in checks_of_decoding(SETTING) if check.name in names])
    assert {name for name, outcome in found.items() if outcome == "failed"} == broken


def test_stale_cache_row_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVLayer, "move", lambda *_: None)
    found = outcomes([check for check in checks_of_decoding(SETTING) if check.name == "batch"])
    assert found == {"batch": "failed"}


def test_lossy_drafts_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def hotter(request: Request) -> Request:
        sampling = dataclasses.replace(request.sampling, seed=request.sampling.seed + 1)
        return dataclasses.replace(request, sampling=sampling)

    class Faulty(Engine):
        def generate(self, requests: Sequence[Request], **options: Any) -> Any:
            drafting = self.options.max_drafts > 0
            return super().generate(
                [hotter(each) if drafting else each for each in requests], **options
            )

    monkeypatch.setattr(decoding, "Engine", Faulty)
    found = outcomes([check for check in checks_of_decoding(SETTING) if check.name == "drafts"])
    assert found == {"drafts": "failed"}


def test_rejected_drafts_that_stay_in_a_row_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVLayer, "shift", lambda *_: None)
    found = outcomes([check for check in checks_of_decoding(SETTING) if check.name == "drafts"])
    assert found == {"drafts": "failed"}


# Loaded by every Python process: doubles the loss, as if it were not divided by the number of
# micro-batches.
UNSCALED = """
import importlib.abc, sys

class Patch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "tita.train.training":
            return None
        sys.meta_path.remove(self)
        from tita.train.trainer import PairTrainer
        compute = PairTrainer.compute_loss

        def unscaled(self, *given, **named):
            found = compute(self, *given, **named)
            return (2 * found[0], *found[1:]) if isinstance(found, tuple) else 2 * found

        PairTrainer.compute_loss = unscaled
        return None

sys.meta_path.insert(0, Patch())
"""


@pytest.mark.slow
def test_unscaled_loss_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(UNSCALED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "work").mkdir()
    work = Workshop(tmp_path / "work", TINY_REWARD, 1)
    (check,) = checks_of_training(work, dtypes=("float32",), short=True)
    (result,) = run_checks([check], budget_s=600)
    assert result.outcome == "failed"
    assert "loss of step 1 is 1.3863, in plain torch 0.6931" in result.detail


def test_checks_end_in_four_ways() -> None:
    def raising(error: Exception) -> Callable[[], Any]:
        def run() -> Any:
            raise error

        return run

    def check(name: str, run: Callable[[], Any], expected_s: float = 1) -> Check:
        return Check(name=name, group="right", about="", run=run, expected_s=expected_s)

    results = {
        result.name: result
        for result in run_checks(
            [
                check("good", lambda: {"x": 1}),
                check("wrong", raising(CheckFailed("2, not 1"))),
                check("absent", raising(NotHere("no GPU"))),
                check("broken", raising(RuntimeError("CUDA error: an illegal access\nmore"))),
                check("late", dict, expected_s=10_000),
            ],
            budget_s=1000,
        )
    }
    assert results["good"].figures == {"x": 1.0}
    assert {name: result.outcome for name, result in results.items()} == {
        "good": "passed", "wrong": "failed", "absent": "skipped", "broken": "failed",
        "late": "skipped",
    }  # fmt: skip
    assert results["broken"].detail == "RuntimeError: CUDA error: an illegal access"
    assert results["late"].detail.endswith("give more --minutes")
