"""The log of a node's processes in the store."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tita.errors import ExitCode
from tita.gang.log_archive import read_logs
from tita.storage import Store, open_store

RUN = """
import subprocess, sys
from tita.errors import TitaError
from tita.gang import log_archive
from tita.storage import open_store
log_archive._UPLOAD_EVERY_S = 0.1
with log_archive.archive_log(open_store(), "r"):
    print("from python", flush=True)
    subprocess.run(["sh", "-c", "echo from a child; echo its error >&2"])
    {body}
print("after")
"""


@pytest.fixture(params=["directory", "s3"])
def environment(tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, str]:
    if request.param == "s3":
        found: dict[str, str] = request.getfixturevalue("s3_environment")
        return found
    return {**os.environ, "TITA_STORE": str(tmp_path / "store")}


def start(environment: dict[str, str], body: str = "pass") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN.format(body=body)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def store_of(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Store:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return open_store(environment["TITA_STORE"])


def test_all_that_is_written_is_kept(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, _ = start(environment).communicate(timeout=60)
    lines = ["from python", "from a child", "its error"]
    assert shown.splitlines() == [*lines, "after"]
    store = store_of(environment, monkeypatch)
    assert list(read_logs(store, "r")) == lines
    start(environment, "raise TitaError('no pairs')").communicate(timeout=60)
    assert list(read_logs(store, "r")) == [*lines, *lines, "no pairs"]
    assert list(read_logs(store, "r2")) == []


def test_killed_process(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(environment, "import time; time.sleep(60)")
    store = store_of(environment, monkeypatch)
    deadline = time.monotonic() + 60
    while "from a child" not in list(read_logs(store, "r")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert "from a child" in list(read_logs(store, "r"))


def test_long_logs_keep_their_start_and_their_end(tmp_path: Path) -> None:
    environment = {**os.environ, "TITA_STORE": str(tmp_path / "store")}
    body = "[print(f'line {i:07d}', 'x' * 100) for i in range(60000)]"
    shown, _ = start(environment, body).communicate(timeout=120)
    assert len(shown.splitlines()) == 60004
    lines = list(read_logs(open_store(environment["TITA_STORE"]), "r"))
    assert lines[0] == "from python"
    assert lines[-1].startswith("line 0059999")
    assert any("bytes omitted" in line for line in lines)
    assert sum(map(len, lines)) < 5 << 20


def test_a_store_that_cannot_be_written_does_not_stop_the_job(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file")
    environment = {**os.environ, "TITA_STORE": str(blocked / "store")}
    process = start(environment)
    shown, told = process.communicate(timeout=60)
    assert (process.returncode, shown.splitlines()[-1]) == (0, "after"), told


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ("build-pairs", "neither a complete tree"),
        ("train-dpo", "neither a complete tree"),
        ("benchmark", "no endpoint"),
    ],
)
def test_the_log_of_every_job_is_kept(tmp_path: Path, job: str, words: str) -> None:
    own = {"TITA_STORE": str(tmp_path / "store"), "TITA_RUN": "r", "TITA_NAMESPACE": "lab"}
    own["TITA_TERMINATION_LOG"] = str(tmp_path / "last-word")
    done = subprocess.run(
        [sys.executable, "-m", "tita", job],
        env={**os.environ, **own}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == ExitCode.USER
    assert words in "\n".join(read_logs(open_store(own["TITA_STORE"]), "r")), done
