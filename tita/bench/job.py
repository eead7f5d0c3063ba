"""The benchmark job: ask the inference Service, compare with the last good report, publish."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from tita.bench.archive import REPORTS, fetch, find_report
from tita.bench.compare import check_gates, compare
from tita.bench.evaluate import Evaluation, evaluate, read_runs
from tita.bench.load_shape import ClientOptions
from tita.bench.publish import publish
from tita.bench.questions import image_folder, question_file
from tita.bench.registry import ModelEndpoint, RegisteredModel
from tita.bench.request_body import GenerationOptions
from tita.bench.sample import write_sample
from tita.bench.tasks import BenchmarkTask, run_endpoint, sweep_tasks
from tita.errors import JobFailed, TitaError
from tita.recipes import BenchmarkRecipe
from tita.settings import settings
from tita.storage import Store
from tita.terminal import say

_GOOD_SUCCESS_RATE = 0.99
"""Minimum success rate of a report that later reports are compared with."""


def run_job(recipe: BenchmarkRecipe, *, store: Store, run_id: str) -> dict[str, Any]:
    """Ask all questions with every weight of the recipe, publish a report, and check the gates.

    Returns:
        The report's index entry.

    Raises:
        JobFailed: a gate failed, after the report was published; or no question was answered.
        TitaError: the recipe has no endpoint.
    """
    if recipe.base_url is None:
        raise TitaError(
            "no endpoint", where="recipe", remedy="give --set base_url=http://HOST:PORT/v1"
        )
    endpoint = ModelEndpoint(
        name=recipe.model,
        model=RegisteredModel(id=recipe.model),
        base_url=recipe.base_url.rstrip("/"),
        key=_first_api_key(),
    )
    options = ClientOptions(concurrency=recipe.concurrency, timeout_s=recipe.timeout_s)
    with tempfile.TemporaryDirectory(dir=settings().scratch_dir) as scratch:
        folder = Path(scratch) / "results"
        folder.mkdir()
        tasks = _build_tasks(recipe, folder=folder)
        with _resumable(tasks, store=store, run_id=run_id):
            for task in tasks:
                say(f"weight {task.generation.weight:g}")
                run_endpoint(task, endpoint, options=options, extra={"job": run_id})
            evaluation = evaluate(folder)
            runs = evaluation.report["runs"]
            if not any(run["num_answered"] for run in runs):
                raise JobFailed("no question was answered", where=recipe.base_url)
            failures = _failed_gates(recipe, evaluation, store=store)
            is_reliable = all(run["success_rate"] >= _GOOD_SUCCESS_RATE for run in runs)
            entry = publish(
                evaluation,
                folder=folder,
                images=tasks[0].images,
                store=store,
                good=not failures and is_reliable,
            )
    say(f"published report {entry['id']} to {store.uri}")
    if failures:
        raise JobFailed("; ".join(failures), where=f"report {entry['id']}")
    return entry


def _build_tasks(recipe: BenchmarkRecipe, *, folder: Path) -> list[BenchmarkTask]:
    if recipe.questions is None:
        questions = folder / "sample_questions.jsonl"
        write_sample(questions, seed=recipe.seed)
    else:
        questions = question_file(recipe.questions)
    task = BenchmarkTask(
        questions=questions,
        images=image_folder(recipe.images, questions=questions),
        out=folder,
        limit=recipe.max_questions,
        ignore_columns=recipe.ignore_columns,
        generation=GenerationOptions(max_new_tokens=recipe.max_new_tokens),
    )
    # A release with weight 0 has that weight twice in its recipe.
    return sweep_tasks(task, weights=list(dict.fromkeys(recipe.weights)), model=recipe.model)


def _first_api_key() -> SecretStr | None:
    """The first API key that the release's server accepts."""
    keys = settings().api_keys
    first = keys.get_secret_value().split(",")[0].strip() if keys else ""
    return SecretStr(first) if first else None


@contextlib.contextmanager
def _resumable(tasks: Sequence[BenchmarkTask], *, store: Store, run_id: str) -> Iterator[None]:
    """Restore the answers of an earlier pod of this run; save the answers if this pod fails."""
    keys = {task.out: f"{REPORTS}/partial/{run_id}/{task.out.name}" for task in tasks}
    for path, key in keys.items():
        if store.exists(key):
            path.write_bytes(store.get(key))
            say(f"resuming from {key}")
    try:
        yield
    except BaseException:
        for path, key in keys.items():
            if path.exists() and path.stat().st_size:
                store.put(key, path.read_bytes())
        raise
    for key in keys.values():
        if store.exists(key):
            store.delete(key)


def _failed_gates(recipe: BenchmarkRecipe, evaluation: Evaluation, *, store: Store) -> list[str]:
    """Compare each run with the run of the same protocol in the last good report."""
    if recipe.fail_below is None and recipe.fail_slower is None:
        return []
    try:
        good = find_report("last-good", store=store)
    except TitaError:
        say("gates not checked: there is no good report to compare with")
        return []
    folder = fetch(good, store=store)
    earlier = [
        run for name in {run["file"] for run in good["runs"]} for run in read_runs(folder / name)
    ]
    failures = []
    for run in evaluation.runs:
        before = next((old for old in earlier if dict(old.protocol) == dict(run.protocol)), None)
        if before is None:
            say(f"gates not checked for {run.title}: {good['id']} has no run of its protocol")
            continue
        summary = compare(before, run).summary
        texts = check_gates(summary, fail_below=recipe.fail_below, fail_slower=recipe.fail_slower)
        failures += [f"{run.title} against {good['id']}: {text}" for text in texts]
    return failures
