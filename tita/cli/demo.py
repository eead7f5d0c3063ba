"""`tita demo`: the whole pipeline on one machine."""

import os
from pathlib import Path
from typing import Annotated

import typer

from tita.cli.app import app
from tita.imports import without_garbage_collection


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the store, report.json and report.html.")
    ] = Path("demo-out"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Run few questions and steps, for a smoke test.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of data and training.", min=0)] = 0,
) -> None:
    """Run the demo on this machine.

    Makes data and pairs, trains with DPO, answers test questions, and writes a report.
    """
    # More threads are slower for models this small. OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with without_garbage_collection():
        from tita.demo.loop import FULL, QUICK, run_demo

    run_demo(out, config=QUICK if quick else FULL, seed=seed)
