"""Standard output and `--out` that are closed, full, or no regular file."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tita.data.append_log import AppendLog
from tita.errors import ExitCode
from tita.storage.files import atomic_path, is_stream

TITA = [sys.executable, "-m", "tita"]


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TITA_STORE": str(folder / "store")}
    return subprocess.run(
        ["bash", "-c", f"{' '.join(TITA)} {command}"],
        capture_output=True, text=True, timeout=60, env=environment,
    )  # fmt: skip


@pytest.mark.parametrize("command", ["--version", "data ls -o json", "--help", "infer --help"])
@pytest.mark.parametrize(
    ("redirection", "words"),
    [(">&-", "standard output is closed"), (">/dev/full", "no space left on device")],
)
def test_output_that_cannot_be_written(
    command: str, redirection: str, words: str, tmp_path: Path
) -> None:
    done = shell(f"{command} {redirection}", tmp_path)
    assert done.returncode == ExitCode.USER
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_closed_standard_error_and_input(tmp_path: Path) -> None:
    done = shell("data ls -o json 2>&- <&-", tmp_path)
    assert (done.returncode, json.loads(done.stdout)) == (0, [])


class Lines(AppendLog):
    KIND = "file of lines"

    def _parse(self, line: bytes) -> dict[str, object] | None:
        return json.loads(line)  # type: ignore[no-any-return]

    def _identity(self, record: object) -> str | None:
        return str(record)

    def _check(self, record: object, *, where: str) -> None:
        return


def write(path: Path) -> None:
    with Lines(path) as log:
        log.append({"question_id": "b"})
        log.append({"question_id": "a"})
        log.sort_by_question(["a", "b"])


def test_answers_go_to_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    thread = threading.Thread(target=write, args=(tmp_path / "fifo",), daemon=True)
    thread.start()
    assert (tmp_path / "fifo").read_text() == '{"question_id": "b"}\n{"question_id": "a"}\n'
    thread.join(timeout=10)
    assert is_stream(tmp_path / "fifo")


def test_devices_stay_devices(tmp_path: Path) -> None:
    """As root, a rename would replace /dev/null for the whole machine."""
    null = Path("/dev/null").stat()
    write(Path("/dev/null"))
    with atomic_path(Path("/dev/null")) as temporary:
        temporary.write_text("page")
    assert os.path.samestat(Path("/dev/null").stat(), null)
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write(Path("/dev/full"))


def test_a_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "page.html"

    def write_to_full_disk() -> None:
        with atomic_path(path) as temporary:
            temporary.symlink_to("/dev/full")
            temporary.write_text("page")

    with pytest.raises(OSError, match="No space left") as full:
        write_to_full_disk()
    assert full.value.filename == str(path)
    with pytest.raises(OSError, match="reset") as other, atomic_path(path):
        raise OSError(errno.ECONNRESET, "reset")
    assert other.value.filename is None


def test_standard_output_by_its_name(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path\n"
        "from tita.storage.files import atomic_path\n"
        "with atomic_path(Path('/dev/stdout')) as temporary: temporary.write_text('page')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "page"
    with (tmp_path / "file").open("wb") as file:
        subprocess.run([sys.executable, "-c", script], stdout=file, timeout=60, check=True)
    assert (tmp_path / "file").read_text() == "page"
    assert Path("/dev/stdout").is_symlink()
