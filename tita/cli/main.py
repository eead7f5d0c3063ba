"""Entry points of the console scripts: run a command and report a failure in one line."""

import errno
import io
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NoReturn

import typer
from typer.main import get_command

from tita.errors import ExitCode, TitaError, from_os_error

# Typer bundles click from 0.26 on and depends on the package before. Either way ClickException, the
# base of all usage errors, is the grandparent of BadParameter.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]

_NO_HOME = "Could not determine home directory."
"""What `Path.expanduser` says of `~name` if there is no such user."""


def tita(argv: Sequence[str] | None = None) -> NoReturn:
    """The `tita` command."""
    from tita.cli.commands import app

    sys.exit(run(app, argv, name="tita"))


def tita_bench(argv: Sequence[str] | None = None) -> NoReturn:
    """The `tita-bench` command."""
    from tita.cli.bench import app

    sys.exit(run(app, argv, name="tita-bench"))


def run(app: typer.Typer, argv: Sequence[str] | None, *, name: str) -> int:
    """Run `app` and return its exit code; failures are reported in one line on standard error."""
    closed = _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # A terminal without UTF-8 shows what it cannot encode as \u5b57.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = get_command(app).main(
            args=None if argv is None else list(argv), prog_name=name, standalone_mode=False
        )
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the pipe exited (`| head`)
        _discard_stdout()
        return ExitCode.FAILED
    except (typer.Abort, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    except _UsageError as error:
        return _report_usage_error(name, error)
    except TitaError as error:
        _maybe_traceback()
        return _report(name, str(error), error.exit_code)
    except OSError as error:
        return _report_os_error(name, error, closed=closed)
    except RuntimeError as error:
        if str(error) != _NO_HOME:
            raise
        text = "a path begins with ~ and a user without a home folder here; write the whole path"
        return _report(name, text, ExitCode.USER)
    except ModuleNotFoundError as error:
        # A machine that only submits jobs has no torch; with it, the installation is damaged.
        if find_spec("torch") is not None:
            raise
        text = f"this command needs {error.name}, which is not installed; pip install 'tita[ml]'"
        return _report(name, text, ExitCode.USER)
    return code if isinstance(code, int) else ExitCode.OK


def _open_closed_streams() -> list[str]:
    """Open standard streams that the parent closed; otherwise the next file takes their number.

    Returns the names of these streams.

    Writing to a closed standard output then fails, as it does in other programs.
    """
    closed = []
    for number, stream in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, stream) is None:
            closed.append(stream)
            descriptor = os.open(os.devnull, os.O_RDONLY if number < 2 else os.O_WRONLY)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            mode = "r" if number == 0 else "w"
            setattr(sys, stream, open(number, mode, closefd=False))  # noqa: SIM115
    return closed


def _discard_stdout() -> None:
    """Suppress the interpreter's own message at exit about output that cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report_os_error(name: str, error: OSError, *, closed: Sequence[str]) -> int:
    if "stdout" in closed and error.errno == errno.EBADF:
        _discard_stdout()
        text = "standard output is closed; redirect it to a file or to /dev/null"
        return _report(name, text, ExitCode.USER)
    known = from_os_error(error)
    if known is None:
        raise error
    _maybe_traceback()
    if error.filename is None:  # a full or closed standard output
        _discard_stdout()
    return _report(name, str(known), known.exit_code)


def _report_usage_error(name: str, error: Any) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message())
        return ExitCode.OK
    context = getattr(error, "ctx", None)
    remedy = f"; see '{context.command_path} --help'" if context else ""
    return _report(name, error.format_message().rstrip(".") + remedy, ExitCode.USER)


def _report(name: str, text: str, code: ExitCode) -> int:
    print(f"{name}: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return code


def _maybe_traceback() -> None:
    if os.environ.get("TITA_DEBUG", "") not in ("", "0", "false"):
        import traceback

        traceback.print_exc()
