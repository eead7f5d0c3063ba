"""`tita selftest`: whether tita is right and fast on this machine's devices."""

from pathlib import Path
from typing import Annotated

import typer

from tita.cli.app import app
from tita.errors import ExitCode


@app.command()
def selftest(
    out: Annotated[Path, typer.Option(help="Folder for selftest.json and selftest.html.")] = Path(
        "selftest-out"
    ),
    gpu: Annotated[
        bool | None,
        typer.Option("--gpu/--cpu", help="Check the GPUs, or the processor; default: GPUs if any."),
    ] = None,
    minutes: Annotated[
        float,
        typer.Option(help="Maximum duration; checks that would end later are skipped.", min=0.1),
    ] = 8.0,
) -> None:
    """Check guided decoding and training on this machine with random models.

    Needs no network. The exit code is 1 if a check failed.
    """
    from tita.selftest.result_page import verdict
    from tita.selftest.run import run_selftest

    device = None if gpu is None else "cuda" if gpu else "cpu"
    results = run_selftest(out, device=device, minutes=minutes)
    print(f"{verdict(results)} {out / 'selftest.html'}")
    if any(result.outcome == "failed" for result in results):
        raise typer.Exit(ExitCode.FAILED)
