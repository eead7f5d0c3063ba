"""`tita demo`: the whole loop on one machine."""

from pathlib import Path
from typing import Annotated

import typer

from tita.cli.app import app


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the store, report.json and report.html.")
    ] = Path("demo-out"),
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A few questions and steps: shows the way, proves nothing."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of data and training.", min=0)] = 0,
) -> None:
    """Go round the whole loop here: data, pairs, DPO, aligned answers, report."""
    from tita.demo.loop import FULL, QUICK, run_demo

    run_demo(out, plan=QUICK if quick else FULL, seed=seed)
