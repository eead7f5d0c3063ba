"""`tita demo --quick` end to end, reuse of finished steps, interruption and errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.installed import outside
from tita.demo.models import demo_model_path

# On a busy machine, four jobs and all answers take minutes.
pytestmark = pytest.mark.timeout(600)


def demo(out: Path, *arguments: str) -> "subprocess.Popen[str]":
    return start([sys.executable, "-m", "tita"], out, *arguments)


def start(
    program: list[str], out: Path, *arguments: str, **options: Any
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*program, "demo", "--quick", "--out", str(out), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process: "subprocess.Popen[str]", *, code: int = 0) -> tuple[str, str]:
    stdout, stderr = process.communicate(timeout=560)
    assert process.returncode == code, stderr
    return stdout, stderr


@pytest.fixture(scope="module")
def done(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the demo of an installed wheel, with nothing of the checkout."""
    folder = tmp_path_factory.mktemp("demo")
    out = folder / "out"
    process = start([str(installed / "tita")], out, env=outside(), cwd=folder)
    stdout, _ = finish(process)
    assert "guided, w = 0.3" in stdout
    assert "Criteria:" in stdout
    assert "What it costs, what it brings:" in stdout
    # `.ci/run` shows it.
    if (kept := os.environ.get("TITA_TEST_DEMO_OUT")) and not Path(kept).exists():
        shutil.copytree(out, kept)
    return out


def temporary_files(out: Path) -> list[Path]:
    return [path for path in out.rglob(".*") if path.is_file()]


@pytest.mark.slow
def test_the_demo_writes_a_store_and_two_reports(done: Path) -> None:
    assert {path.name for path in done.iterdir()} == {"store", "report.json", "report.html"}
    report = json.loads((done / "report.json").read_text())
    names = [row["name"] for row in report["rows"]]
    assert names[0] == "base"
    assert "reward model alone" in names
    for weight in ("0.1", "0.3", "0.5", "1"):
        for kind in ("guided", "other images", "no DPO"):
            assert f"{kind}, w = {weight}" in names
    assert len(report["verdict"]["checks"]) == 4
    methods = {method["name"]: method for method in report["methods"]}
    assert list(methods)[:4] == ["base", "vcd, as published", "vcd", "m3id"]
    assert {"guided, noise pairs", "guided, contrast pairs"} < methods.keys()
    (joint,) = (method for name, method in methods.items() if name.startswith("vcd and"))
    assert joint["controls"].keys() == {"other images", "no DPO"}
    assert report["verdict"]["pairs"] in ("noise pairs", "contrast pairs")
    assert "reached" in report["verdict"]
    existence = report["rows"][0]["categories"]["existence"]
    assert existence["f1"] is not None
    assert existence["yes_ratio"] is not None
    store = done / "store"
    runs, pairs = ([*(store / name).iterdir()] for name in ("runs", "pairs"))
    assert len(runs) == len(pairs) == 2
    assert all((run / "model" / "model.safetensors").is_file() for run in runs)
    assert all((each / "pairs.jsonl").stat().st_size for each in pairs)
    assert not temporary_files(done)


@pytest.mark.slow
def test_the_page_needs_no_network(done: Path) -> None:
    page = (done / "report.html").read_text()
    assert "<svg" in page
    assert "data:image/png;base64," in page
    assert 'src="http' not in page
    assert "McNemar" in page


@pytest.mark.slow
def test_weight_1_and_the_reward_model_alone_agree(done: Path) -> None:
    rows = {row["name"]: row for row in json.loads((done / "report.json").read_text())["rows"]}
    one, alone = rows["guided, w = 1"], rows["reward model alone"]
    assert (one["accuracy"], one["categories"]) == (alone["accuracy"], alone["categories"])


@pytest.mark.slow
def test_a_second_run_reuses_every_step(done: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(done, out)
    before = json.loads((out / "report.json").read_text())
    _, stderr = finish(demo(out))
    assert stderr.count("already exists") == 5
    after = json.loads((out / "report.json").read_text())
    assert after["rows"] == before["rows"]


@pytest.mark.slow
def test_ctrl_c_leaves_no_temporary_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = demo(out)
    deadline = time.monotonic() + 200
    while not (out / "store" / "data" / "manifest.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert not (out / "report.json").exists()
    assert not temporary_files(out)


@pytest.mark.slow
def test_an_output_folder_that_is_a_file_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    stdout, stderr = finish(demo(tmp_path / "out"), code=2)
    assert stdout == ""
    assert stderr.strip().splitlines()[-1].startswith("tita: ")
    assert "Traceback" not in stderr
    assert (tmp_path / "out").read_text() == "in the way"


@pytest.mark.slow
def test_a_read_only_file_system_is_a_one_line_error(tmp_path: Path) -> None:
    # /proc refuses new folders even to root, as a read-only file system does.
    _, stderr = finish(demo(Path("/proc/demo-out")), code=2)
    assert len(stderr.strip().splitlines()) == 1
    assert "/proc/demo-out" in stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 KiB: enough for a few scenes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_a_one_line_error_without_a_tree(small_disk: Path) -> None:
    _, stderr = finish(demo(small_disk / "out"), code=2)
    last = stderr.strip().splitlines()[-1]
    assert "no space left on device" in last
    assert "free some space" in last
    assert "Traceback" not in stderr
    assert not list(small_disk.rglob("manifest.json"))
    assert not temporary_files(small_disk)


@pytest.mark.slow
def test_a_missing_image_is_an_error_of_build_pairs(done: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(done / "store" / "data", store / "data")
    next((store / "data" / "ocrvqa" / "images").glob("train-*.png")).unlink()
    asked = ["launch", "build-pairs", "--local", "--store", str(store), "--name", "broken"]
    recipe = ["questions=data/train.jsonl", f"model={demo_model_path('base')}", "dtype=float32"]
    process = subprocess.run(
        [sys.executable, "-m", "tita", *asked, *(w for r in recipe for w in ("--set", r))],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 65
    assert "does not match its manifest" in process.stderr + process.stdout
    assert "Traceback" not in process.stderr + process.stdout
    assert not (store / "pairs").exists()
