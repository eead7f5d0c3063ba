"""Jobs as local processes, with a fake `tita <job>`."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tita.demo.models import demo_model_path
from tita.demo.scenes import make_scenes, write_scenes
from tita.errors import ExitCode
from tita.launch.local import launch_local, run_node_processes
from tita.launch.template import JobShape

ROOT = Path(__file__).parents[2]
Job = Callable[[str], None]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Writes the fake `python -m tita`."""
    monkeypatch.chdir(tmp_path)

    def write(code: str) -> None:
        (tmp_path / "tita").mkdir(exist_ok=True)
        (tmp_path / "tita" / "__init__.py").write_text("")
        preamble = "import os, signal, subprocess, sys, time\nrank = os.environ['TITA_NODE_RANK']\n"
        (tmp_path / "tita" / "__main__.py").write_text(preamble + code)

    return write


def run(*, nodes: int = 1, grace_s: float = 5.0) -> tuple[int, list[tuple[int, str]]]:
    lines: list[tuple[int, str]] = []
    code = run_node_processes(
        "train-dpo", recipe={"beta": 0.2}, run="my-run", store="st", nodes=nodes, grace_s=grace_s,
        on_line=lambda rank, text: lines.append((rank, text)),
    )  # fmt: skip
    return code, lines


def test_environment_of_a_node(job: Job) -> None:
    job(
        "print(*sys.argv[1:], rank, *[os.environ['TITA_' + n] for n in "
        "('RUN', 'RECIPE', 'STORE', 'NUM_NODES', 'PROCS_PER_NODE', 'MASTER_ADDR')])\n"
    )
    code, lines = run(nodes=2)
    assert code == 0
    assert sorted(lines) == [
        (rank, f'train-dpo {rank} my-run {{"beta": 0.2}} st 2 2 127.0.0.1') for rank in (0, 1)
    ]


def test_one_failure_ends_all_nodes(job: Job) -> None:
    job("if rank == '1': sys.exit(12)\ntime.sleep(600)\n")
    code, _ = run(nodes=3)
    assert code == ExitCode.OUT_OF_MEMORY


def test_node_that_ignores_sigterm_is_killed(job: Job) -> None:
    job(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if rank == '1': sys.exit(2)\n"
        "time.sleep(600)\n"
    )
    code, _ = run(nodes=2, grace_s=0.5)
    assert code == ExitCode.USER


def test_orphaned_workers_are_killed(job: Job, tmp_path: Path) -> None:
    job(
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], "
        "start_new_session=True)\nopen('pid', 'w').write(str(child.pid))\nsys.exit(1)\n"
    )
    assert run()[0] == ExitCode.FAILED
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 60
    while _alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("signum", "expected"),
    [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, ExitCode.RETRY)],
)
def test_signals_are_forwarded(job: Job, signum: int, expected: int) -> None:
    job(
        "def save(*_):\n    print('saved', flush=True)\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    lines: list[str] = []

    def on_line(rank: int, text: str) -> None:
        lines.append(text)
        if text == "ready":
            threading.Timer(0.1, os.kill, (os.getpid(), signum)).start()

    before = signal.getsignal(signum)
    code = run_node_processes("train-dpo", recipe={}, run="r", store="s", on_line=on_line)
    assert code == expected
    assert lines == ["ready", "saved"]
    assert signal.getsignal(signum) is before


def test_progress_bars_keep_their_last_state(job: Job) -> None:
    job("sys.stdout.write('10%\\r50%\\r100%\\nnext\\n')\n")
    assert [text for _, text in run()[1]] == ["100%", "next"]


@pytest.mark.slow
def test_exit_code_of_the_command(tmp_path: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TITA_")}
    environment = clean | {"TITA_STORE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tita", "launch", "train-dpo", "--local"],
        capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == ExitCode.USER
    assert f"neither a complete tree in the store {tmp_path}" in done.stderr
    assert "0 GPUs on this machine; running 1 worker on the CPU" in done.stderr


def test_display_is_that_of_a_cluster_run(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    figures = (
        "loss=0.5, reward_margin=0.2, reward_accuracy=0.75, learning_rate=1e-6, "
        "samples_per_s=3.0, seconds_left=9.0, peak_memory_bytes=1"
    )
    job(
        "import json\nprint('loaded')\n"
        "for step in (5, 10):\n"
        f"    print(json.dumps(dict(progress=dict(step=step, steps=10, {figures}))))\n"
    )
    code = launch_local(
        "train-dpo", recipe={}, run="my-run", store="st", shape=JobShape(nodes=1, gpus_per_node=2)
    )
    assert code == 0
    assert [re.sub(r"  \d+:\d+$", "", line) for line in capsys.readouterr().err.splitlines()] == [
        "my-run  starting  0/1 running",
        "0| loaded",
        "my-run  running  1/1 running",
        "my-run  training  1/1 running",
        "step 5/10  loss 0.500  margin 0.20  acc 75%  3.0/s  0:09 left",
        "my-run  uploading  1/1 running",
        "step 10/10  loss 0.500  margin 0.20  acc 75%  3.0/s  0:09 left",
        "my-run  done",
        "my-run is done",
    ]


@pytest.mark.slow
def test_a_real_gang_shows_its_stages(tmp_path: Path) -> None:
    """Two ranks of `train-dpo`: what they do before the first step, and the reference pass.

    Stages are read once a second, so the pass must last for several.
    """
    questions = write_scenes(tmp_path / "images", make_scenes("train", number=400), name="train")
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for question in questions:
            answer = question.references[0]
            row = {"id": question.id, "image_id": question.image, "question": question.text}
            row |= {"chosen": answer, "reject": "no" if answer != "no" else "yes"}
            file.write(json.dumps(row) + "\n")
    recipe = {
        "model": demo_model_path("reward"), "pairs": tmp_path / "pairs.jsonl",
        "images": tmp_path / "images", "dtype": "float32", "gradient_checkpointing": "false",
        "freeze_vision": "false", "batch_size": 1, "max_steps": 2, "logging_steps": 1,
        "max_length": 64,
    }  # fmt: skip
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tita", "launch", "train-dpo", "--local", "--gpus", "2"),
            *("--store", str(tmp_path / "store"), "--name", "my-run", "-o", "json"),
            *(word for key, value in recipe.items() for word in ("--set", f"{key}={value}")),
        ],
        capture_output=True, text=True, timeout=200, cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith(("TITA_", "AWS_"))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    shown = [stage for event in events if event["event"] == "stages" for stage in event["stages"]]
    names = list(dict.fromkeys(stage["name"] for stage in shown))
    assert names[:2] == ["starting", "importing libraries"]
    assert "reference pass" in names
    reference = [stage for stage in shown if stage["name"] == "reference pass"]
    assert reference[-1]["unit"] == "batches"
    assert 0 < reference[-1]["done"] <= reference[-1]["total"] == 600
    phases = [event["phase"] for event in events if event["event"] == "state"]
    assert phases[:3] == ["starting", "running", "training"]
    first = next(index for index, event in enumerate(events) if event.get("phase") == "training")
    assert "reference pass" in json.dumps(events[:first])
    assert not [e for e in events if e["event"] == "log" and "reference pass" in e["text"]]
