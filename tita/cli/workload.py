"""The commands that pods run: `tita build-pairs`, `tita train-dpo` and `tita benchmark`."""

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from tita.cli.app import app

_RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="YAML file with keys of the recipe.")
]
_Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Recipe override, key=value; repeatable."),
]
_RunName = Annotated[str | None, typer.Option("--run", help="Run id; default: TITA_RUN.")]


@app.command()
def build_pairs(
    recipe: _RecipeFile = None, overrides: _Overrides = None, run: _RunName = None
) -> None:
    """Build preference pairs: the workers of one node."""
    _run_job("build-pairs", recipe_file=recipe, overrides=overrides or [], run=run)


@app.command()
def train_dpo(
    recipe: _RecipeFile = None, overrides: _Overrides = None, run: _RunName = None
) -> None:
    """Train the reward model with DPO: the workers of one node."""
    _run_job("train-dpo", recipe_file=recipe, overrides=overrides or [], run=run)


@app.command()
def benchmark(
    recipe: _RecipeFile = None, overrides: _Overrides = None, run: _RunName = None
) -> None:
    """Run the benchmark job and publish its report."""
    from tita.activity import enter_stage, report_stages
    from tita.bench.job import run_job
    from tita.errors import TitaError
    from tita.gang.log_archive import archive_log
    from tita.gang.stages import StageReporter
    from tita.recipes import BenchmarkRecipe, resolve_recipe
    from tita.settings import settings
    from tita.storage import open_store

    environment = settings()
    merged = resolve_recipe(BenchmarkRecipe, file=recipe, overrides=overrides or [])
    in_pod = environment.namespace is not None
    if in_pod:
        report_stages()
    enter_stage("preparing the questions")
    name = run or environment.run or "benchmark"
    store = open_store()
    with archive_log(store, name) if in_pod else nullcontext():
        try:
            with StageReporter(None, settings=environment) if in_pod else nullcontext():
                entry = run_job(merged, store=store, run_id=name)
        except TitaError as error:
            # The launcher shows the pod's termination message.
            if environment.termination_log is not None:
                message = {"exit_code": int(error.exit_code), "error": str(error)}
                environment.termination_log.write_text(json.dumps(message), encoding="utf-8")
            raise
        print(entry["id"])


def _run_job(job: str, *, recipe_file: Path | None, overrides: list[str], run: str | None) -> None:
    from tita.errors import TitaError
    from tita.gang import run_workers
    from tita.gang.attempts import AttemptRecord
    from tita.gang.gpus import require_gpus
    from tita.gang.log_archive import archive_log
    from tita.jobspec import load_job
    from tita.recipes import RECIPES, ModelRecipe, data_names, missing_trackers, resolve_recipe
    from tita.settings import settings
    from tita.storage import open_store
    from tita.storage.locate import check_exists

    environment = settings()
    recipe = resolve_recipe(RECIPES[job], file=recipe_file, overrides=overrides)
    if missing := missing_trackers(recipe):
        raise TitaError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed here",
            where="report_to",
            remedy=f"install tita[{','.join(missing)}], or remove it from report_to",
        )
    name = run or environment.run
    if not name:
        raise TitaError("the run has no name", remedy="give --run NAME or set TITA_RUN")
    # The worker processes read the complete recipe from here.
    os.environ["TITA_RECIPE"] = recipe.model_dump_json(exclude_unset=True)
    os.environ["TITA_RUN"] = name
    # A pod's log is deleted with the pod. Elsewhere the streams belong to the user.
    in_pod = environment.namespace is not None and environment.node_rank == 0
    store = open_store()
    attempts = AttemptRecord.from_settings(environment, store)
    with archive_log(store, name) if in_pod else nullcontext():
        allow_cpu = isinstance(recipe, ModelRecipe) and recipe.allow_cpu
        require_gpus(environment, allow_cpu=allow_cpu)
        if environment.node_rank == 0:
            # Before the other nodes are waited for, which may take long and holds GPUs.
            for key, where in data_names(recipe).items():
                try:
                    check_exists(where, store=store)
                except TitaError as error:
                    error.what = f"{key}: {error.what}"
                    raise
        if attempts is not None:
            attempts.start()
        code = run_workers(load_job(job).module, settings=environment)
        if attempts is not None:
            code = attempts.end(code)
    raise typer.Exit(code)
