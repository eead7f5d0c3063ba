"""The root `tita` command; sub-commands register themselves with it."""

import re
import sys
from typing import Annotated

import typer

from tita import __version__
from tita.errors import TitaError
from tita.terminal import Output

OutputFormat = Annotated[Output, typer.Option("-o", "--output", help="Output format.")]
StoreUri = Annotated[
    str | None,
    typer.Option(help="Store: s3://bucket/prefix or a directory; default: TITA_STORE."),
]

IgnoreColumn = Annotated[
    list[str] | None,
    typer.Option(help="Column to treat as absent; repeatable. Other unused columns are errors."),
]


# Typer imports pydantic for a flag without a default, which doubles the time of `infer --help`.
_UNSET_FLAGS = {"help": False, "install_completion": False, "show_completion": False}


def decoded(text: str) -> str:
    """A text of the command line or of standard input, which Python decodes.

    A byte order mark at its start is removed; editors on Windows write it into files.

    Raises:
        TitaError: it has bytes of another encoding, which no model and no JSON can take.
    """
    if not re.search("[\ud800-\udfff]", text):
        return text.removeprefix("\ufeff")
    raise TitaError(
        f"{text.encode(errors='replace').decode()[:80]!r} has bytes that are not "
        f"{sys.getfilesystemencoding()}",
        remedy="set LANG to the encoding of the terminal, or convert the text",
    )


def read_question(text: str) -> str:
    """The question of an option or argument; `-` reads it from standard input.

    Raises:
        TitaError: it is empty, or has bytes of another encoding.
    """
    try:
        question = sys.stdin.read() if text == "-" else text
    except UnicodeDecodeError as error:
        question = error.object.decode(errors="surrogateescape")
    question = decoded(question)
    if not question.strip():
        raise TitaError("the question is empty", remedy="write one, such as 'What is this?'")
    return question.strip() if text == "-" else question


def new_app(help_text: str) -> typer.Typer:
    """A Typer app with plain help, which is fast to print, and plain errors."""
    return typer.Typer(
        help=help_text,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "default_map": _UNSET_FLAGS},
    )


app = new_app("Token-level inference-time alignment for vision-language models.")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tita {__version__}")
        raise typer.Exit


VersionOption = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
]


@app.callback()
def _root(version: VersionOption = False) -> None:
    from tita.terminal import configure_logging

    configure_logging()
