"""Displays as text at 80 columns, the live display in a pseudo-terminal, Ctrl-C."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from dataclasses import replace
from typing import Any

import pytest

from tita.errors import ExitCode
from tita.launch.display import JsonDisplay, LiveDisplay, PlainDisplay, live_lines
from tita.launch.run_state import RunPhase, RunSnapshot, WorkerStatus
from tita.records import RankStage, RunStages, TrainProgress, ValidationFigures

PROGRESS = TrainProgress(
    step=150, steps=600, loss=0.4321, reward_margin=0.87, reward_accuracy=0.81,
    learning_rate=2e-6, samples_per_s=12.34, seconds_left=3725, peak_memory_bytes=1,
)  # fmt: skip
WORKERS = (
    WorkerStatus(name="my-run-0-abcde", rank=0, state="running", node="gpu-node-1"),
    WorkerStatus(name="my-run-1-fghij", rank=1, state="running", node="gpu-node-2", restarts=1),
    WorkerStatus(
        name="my-run-2-klmno", rank=2, state="stuck", node="gpu-node-3", note="ImagePullBackOff"
    ),
)
TRAINING = RunSnapshot(
    run="my-run", job="train-dpo", phase=RunPhase.TRAINING, workers=WORKERS, progress=PROGRESS,
    elapsed_s=1234,
)  # fmt: skip


@pytest.fixture
def eighty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("TERM", "xterm")


def test_live_display_at_80_columns(eighty: None) -> None:
    from rich.console import Console

    from tita.launch.display import _cropped

    screen = io.StringIO()
    Console(file=screen, width=80).print(_cropped(live_lines(TRAINING)))
    assert [line.rstrip() for line in screen.getvalue().splitlines()] == [
        "my-run  training  2/3 running  20:34",
        "[##########------------------------------]  25%",
        "step 150/600  loss 0.432  margin 0.87  acc 81%  12.3/s  1:02:05 left",
        "    0 running   gpu-node-1",
        "    1 running   gpu-node-2               try 2",
        "    2 stuck     gpu-node-3                      ImagePullBackOff",
    ]
    assert max(len(line) for line in live_lines(TRAINING)) <= 80


HELD_OUT = ValidationFigures(
    step=100, loss=0.5123, margin=0.4, accuracy=0.76, other_loss=0.7, other_margin=0.1,
    other_accuracy=0.55, image_effect=0.21, image_effect_low=0.12, image_effect_high=0.3,
)  # fmt: skip


def test_held_out_pairs_have_a_line(eighty: None, capsys: pytest.CaptureFixture[str]) -> None:
    text = "held out: loss 0.512  acc 76%, 55% with other images (+12 to +30 points)"
    progress = replace(PROGRESS, validation=HELD_OUT)
    lines = live_lines(replace(TRAINING, progress=progress))
    assert lines[3] == text
    assert max(map(len, lines)) <= 80
    view = PlainDisplay()
    for step in (100, 101, 102):
        view.update(replace(TRAINING, progress=replace(progress, step=step)))
    # Once per evaluation.
    assert capsys.readouterr().err.count(f"step 100: {text}") == 1
    later = replace(progress, validation=replace(HELD_OUT, step=200))
    view.update(replace(TRAINING, progress=later))
    assert f"step 200: {text}" in capsys.readouterr().err


def test_many_pods_are_counted(eighty: None) -> None:
    from tita.launch.display import worker_lines

    many = [WorkerStatus(name=f"r-{i}", rank=i, state="running") for i in range(250)]
    many += [WorkerStatus(name=f"r-{i}", rank=i, state="failed", note="exit 1") for i in range(6)]
    assert worker_lines(many) == ["    250 running", "      6 failed    exit 1"]


def test_plain_display(eighty: None, capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainDisplay()
    for step in (150, 151, 152, 600):
        progress = TrainProgress(**{**vars_of(PROGRESS), "step": step})
        view.update(RunSnapshot(run="r", job="j", phase=RunPhase.TRAINING, progress=progress))
    view.say("a pod waits: 0/2 nodes")
    view.line("0", "loaded")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "r  training  0:00",
        "step 150/600  loss 0.432  margin 0.87  acc 81%  12.3/s  1:02:05 left",
        "step 600/600  loss 0.432  margin 0.87  acc 81%  12.3/s  1:02:05 left",
        "a pod waits: 0/2 nodes",
        "0| loaded",
    ]


def test_plain_display_of_stages(eighty: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Another stage is shown at once, its progress every ten seconds, and none while training."""
    view = PlainDisplay()
    reference = RankStage(name="reference pass", ranks=(0, 1), total=40, unit="batches")
    waits = RankStage(name="waiting for other ranks", ranks=(1,), is_waiting=True)
    loads = RankStage(name="loading the model", ranks=(0, 1))

    def show(at_s: float, *stages: RankStage, phase: RunPhase = RunPhase.RUNNING) -> None:
        found = RunStages(stages=stages, ranks_per_node=1)
        view.update(RunSnapshot(run="r", job="j", phase=phase, stages=found, elapsed_s=at_s))

    show(0, loads)
    show(1, loads)
    for second in range(2, 26):
        show(second, replace(reference, done=second))
    show(26, replace(reference, ranks=(0,), done=39), waits)
    show(30, replace(loads, name="training"), phase=RunPhase.TRAINING)
    assert capsys.readouterr().err.splitlines() == [
        "r  running  0:00",
        "loading the model",
        "reference pass: 2/40 batches",
        "reference pass: 12/40 batches",
        "reference pass: 22/40 batches",
        "r  training  0:30",
    ]


def test_live_display_of_stages(eighty: None) -> None:
    workers = WORKERS[:2]
    snapshot = RunSnapshot(run="r", job="j", phase=RunPhase.RUNNING, workers=workers)
    pull = RankStage(name="pull", ranks=(0, 1, 2, 3), done=5 << 20, total=20 << 20, unit="bytes")
    alike = RunStages(stages=(pull,), ranks_per_node=2)
    assert live_lines(replace(snapshot, stages=alike))[1:] == [
        "[##########------------------------------]  25%",
        "pull: 5/20 MiB",
        "    0 running   gpu-node-1",
        "    1 running   gpu-node-2               try 2",
    ]
    loads = RankStage(name="loading the model", ranks=(0, 1))
    waits = RankStage(name="waiting for other ranks", ranks=(3,), is_waiting=True)
    mixed = RunStages(stages=(loads, replace(pull, ranks=(2,)), waits), ranks_per_node=2)
    assert live_lines(replace(snapshot, stages=mixed))[1:] == [
        "ranks 0-1: loading the model; rank 2: pull: 5/20 MiB",
        "    0 running   gpu-node-1                      loading the model",
        "    1 running   gpu-node-2               try 2  pull: 5/20 MiB, waiting for oth",
    ]


def vars_of(progress: TrainProgress) -> dict[str, Any]:
    return {name: getattr(progress, name) for name in progress.__slots__}


def test_json_display(capsys: pytest.CaptureFixture[str]) -> None:
    view = JsonDisplay()
    view.update(TRAINING)
    view.update(TRAINING)
    view.say("why")
    view.line("1", "text")
    stages = RunStages(stages=(RankStage(name="saving", ranks=(0, 1)),), ranks_per_node=1)
    for _ in range(2):
        view.update(replace(TRAINING, stages=stages))
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["state", "progress", "note", "log", "stages"]
    assert events[4]["stages"][0]["ranks"] == [0, 1]
    assert events[0]["phase"] == "training"
    assert events[0]["pods"][2]["note"] == "ImagePullBackOff"
    assert events[1]["loss"] == 0.4321
    # Later lines have what changed.
    first, second, *rest = TRAINING.workers
    moved = [first, replace(second, state="done", note=""), *rest]
    view.update(replace(TRAINING, stages=stages, workers=moved))
    view.update(replace(TRAINING, stages=stages, workers=list(moved)))
    view.update(replace(TRAINING, stages=stages, workers=moved[1:], phase=RunPhase.RETRYING))
    states = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [[pod["rank"] for pod in event["pods"]] for event in states] == [[second.rank], []]
    assert states[0]["pods"][0]["state"] == "done"
    assert (states[1]["phase"], states[1]["gone"]) == ("retrying", [first.rank])


def test_live_display_draws_only_changes(eighty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = io.StringIO()
    monkeypatch.setattr(sys, "stderr", drawn)
    view = LiveDisplay()
    view.update(TRAINING)
    once = drawn.tell()
    view.update(TRAINING)
    assert drawn.tell() == once
    view.close()


class Terminal:
    """`tita` in a pseudo-terminal of 80 by 24."""

    def __init__(self, lab: Any, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 80))
        environment = lab.environment() | {"TERM": "xterm-256color"}
        environment.pop("COLUMNS")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tita", *arguments],
            stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
            preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def read_until(self, words: str, *, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while words not in plain(self.text):
            assert time.monotonic() < deadline, plain(self.text)
            self._read(0.1)

    def _read(self, timeout_s: float) -> bool:
        ready, _, _ = select.select([self.master], [], [], timeout_s)
        if not ready:
            return True
        try:
            data = os.read(self.master, 65536)
        except OSError:
            return False
        self.text += data.decode(errors="replace")
        return bool(data)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait(self) -> int:
        while self._read(0.2) and self.process.poll() is None:
            pass
        code = self.process.wait(timeout=60)
        while self._read(0.05):
            if not select.select([self.master], [], [], 0.05)[0]:
                break
        os.close(self.master)
        return code


def _own_terminal() -> None:
    import fcntl

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.slow
def test_launch_in_a_terminal(lab: Any) -> None:
    def play(job: Any) -> None:
        pod = lab.api.pod("my-run", node="node-1")
        lab.api.write(pod, "model loaded", json.dumps({"progress": vars_of(PROGRESS)}))
        lab.until(lambda: "training" in plain(terminal.text))
        lab.api.end_pod(pod, 0)
        lab.api.job_over("my-run", "Complete")

    lab.api.on_job = play
    terminal = Terminal(lab, "launch", "train-dpo", "--name", "my-run")
    assert terminal.wait() == ExitCode.OK
    shown = plain(terminal.text)
    assert "submitted my-run (1 pod, 4 GPUs) to namespace lab" in shown
    assert "0| model loaded" in shown
    assert "step 150/600  loss 0.432" in shown
    assert "my-run is done" in shown
    assert "\x1b[?25h" in terminal.text.rpartition("\x1b[?25l")[2], "the cursor is back"


@pytest.mark.slow
def test_ctrl_c_detaches_and_the_second_offers_to_cancel(lab: Any) -> None:
    lab.submit("my-run")
    lab.api.pod("my-run", node="node-1")
    terminal = Terminal(lab, "jobs", "watch", "my-run")
    terminal.read_until("1/1 running")
    terminal.type("\x03")
    terminal.read_until("to resume: tita jobs watch my-run")
    terminal.type("\x03")
    terminal.read_until("cancel my-run?")
    terminal.type("y\n")
    assert terminal.wait() == ExitCode.INTERRUPTED
    assert "my-run is stopping" in plain(terminal.text)
    assert lab.api.get("jobs.batch", "my-run")["spec"]["activeDeadlineSeconds"] == 1


@pytest.mark.slow
def test_ctrl_c_without_a_terminal_detaches_at_once(lab: Any) -> None:
    lab.submit("my-run")
    lab.api.pod("my-run", node="node-1")
    process = subprocess.Popen(
        [sys.executable, "-m", "tita", "jobs", "watch", "my-run"],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=lab.environment(),
    )  # fmt: skip
    assert process.stderr is not None
    assert "running" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPTED
    assert "tita jobs watch my-run" in told
    assert "activeDeadlineSeconds" in lab.api.get("jobs.batch", "my-run")["spec"]


@pytest.mark.slow
def test_logs_go_to_standard_output(lab: Any) -> None:
    lab.submit("my-run", gpus=8)
    pods = [lab.api.pod("my-run", rank, node=f"node-{rank + 1}") for rank in (0, 1)]
    for rank, pod in enumerate(pods):
        lab.api.write(pod, f"rank {rank}")
        lab.api.end_pod(pod, 2 * rank)
    lab.api.job_over("my-run", "Failed", reason="PodFailurePolicy")
    done = lab.cli("jobs", "logs", "my-run", "--all-ranks")
    assert sorted(done.stdout.splitlines()) == ["0| rank 0", "1| rank 1"]
    assert done.returncode == ExitCode.USER
    assert "an error in the recipe or the data" in done.stderr
