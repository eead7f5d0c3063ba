"""A failure is reported in one line on standard error, with its exit code."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tita.cli.commands import app
from tita.cli.main import run
from tita.errors import ExitCode, JobFailed, TitaError, from_os_error


def failing_app(error: BaseException) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    def boom() -> None:
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            TitaError("no such file", where="a.jsonl:3", remedy="check the path"),
            2,
            "a.jsonl:3: no such file; check the path",
        ),
        (TitaError("two\nlines"), 2, "two lines"),
        (JobFailed("rank 1 died"), 1, "rank 1 died"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/x"),
            2,
            "out/x: no space left on device; free",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "from/x", None, "to/x"),
            2,
            "tita: to/x: no space left on device; free",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "out"),
            2,
            "out: read-only file system; choose",
        ),
        (
            OSError(errno.EISDIR, "Is a directory", ".tita-1", None, "out"),
            2,
            "tita: out: is a directory; name a file",
        ),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), 2, "file name too long; shorten"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "x"), 2, "check the links"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_one_line_and_exit_code(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(failing_app(error), [], name="tita") == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tita: ")
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_a_user_without_a_home_folder_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["data", "ls", "--store", "~no-such-user/store"], name="tita") == ExitCode.USER
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("a user without a home folder here; write the whole path")


def test_ctrl_c_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(failing_app(KeyboardInterrupt()), [], name="tita") == ExitCode.INTERRUPTED
    assert capsys.readouterr().err.strip() == ""


def test_unexpected_exceptions_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run(failing_app(ZeroDivisionError()), [], name="tita")


def test_other_operating_system_errors_keep_their_traceback() -> None:
    assert from_os_error(OSError(errno.EBADF, "bad")) is None


@pytest.mark.parametrize("arguments", [["--hepl"], ["no-such-command"]])
def test_usage_errors(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tita", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == ExitCode.USER
    assert re.fullmatch(r"tita: No such .*; see 'tita --help'\n", done.stderr)


def test_closed_pipe_is_silent() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-u", "-m", "tita", "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert done.stderr == ""


def test_invalid_setting_is_named_without_its_value(tmp_path: Path) -> None:
    code = "from tita.settings import settings; settings()"
    environment = {**os.environ, "TITA_MASTER_PORT": "secret-port"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "TITA_MASTER_PORT" in last
    assert "secret-port" not in done.stderr


def test_a_misspelt_setting_is_named(tmp_path: Path) -> None:
    others = {"TITA_API_KEY": "x", "TITA_JUDGE_KEY": "x", "TITA_LOG_LEVEL": "info"}
    environment = {**os.environ, **others, "TITA_STOREE": str(tmp_path), "TITA_CACHEDIR": "x"}
    done = subprocess.run(
        [sys.executable, "-m", "tita", "data", "ls"], env=environment, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr.splitlines()[:-1] == [
        f"tita: {name} is no setting and has no effect; did you mean {near}?"
        for name, near in (("TITA_CACHEDIR", "TITA_CACHE_DIR"), ("TITA_STOREE", "TITA_STORE"))
    ]


def test_operations_guide_lists_every_exit_code() -> None:
    guide = (Path(__file__).parent.parent / "docs" / "operations.md").read_text()
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", guide, flags=re.M)} == set(ExitCode)
