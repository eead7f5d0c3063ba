"""`tita selftest`: whether tita is right and fast on this machine's devices."""

from pathlib import Path
from typing import Annotated

import typer

from tita.cli.app import app
from tita.errors import ExitCode
from tita.imports import without_garbage_collection


@app.command()
def selftest(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for selftest.json and selftest.html; default: selftest-out."),
    ] = None,
    gpu: Annotated[
        bool | None,
        typer.Option("--gpu/--cpu", help="Check the GPUs, or the processor; default: GPUs if any."),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Maximum duration; later checks are skipped; default: 8, or 4 with --cpu.", min=0.1
        ),
    ] = None,
) -> None:
    """Check guided decoding and training on this machine with random models.

    Needs no network. The exit code is 1 if a check failed.
    """
    with without_garbage_collection():
        from tita.selftest.run import run_and_publish

    device = None if gpu is None else "cuda" if gpu else "cpu"
    if run_and_publish(out, device=device, minutes=minutes):
        raise typer.Exit(ExitCode.FAILED)
