"""The benchmark CronJob: ask the inference Service, compare with the last good report, publish."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from tita.bench.archive import REPORTS, fetch, find_report, publish
from tita.bench.columns import BenchmarkRun
from tita.bench.compare import compare, gate
from tita.bench.evaluate import Evaluation, evaluate, runs_of
from tita.bench.questions import image_folder, question_file
from tita.bench.registry import RegisteredModel
from tita.bench.sample import write_sample
from tita.bench.tasks import BenchmarkTask, run_endpoint, sweep_tasks
from tita.bench.worker_pool import ClientOptions, GenerationOptions
from tita.errors import JobFailed, TitaError
from tita.recipes import BenchmarkRecipe, load_recipe, parse_recipe_variable
from tita.settings import settings
from tita.storage import Store, open_store
from tita.terminal import say

_GOOD_SUCCESS_RATE = 0.99
"""A report with more failures than this is no measure for later ones."""


def main() -> None:
    """Run the job that `TITA_RECIPE` and its defaults describe.

    Raises:
        JobFailed: a gate was broken; the report is in the store nevertheless.
    """
    recipe = load_recipe(BenchmarkRecipe, parse_recipe_variable(settings().recipe))
    run_job(recipe, store=open_store(), run_id=settings().run or "benchmark")


def run_job(recipe: BenchmarkRecipe, *, store: Store, run_id: str) -> dict[str, Any]:
    """Ask with every weight of the recipe, report, and hold the result against the last good one.

    Returns:
        the index entry of the report.

    Raises:
        JobFailed: a gate was broken; the report is in the store nevertheless.
        TitaError: no endpoint is named, or no question was answered.
    """
    if recipe.base_url is None:
        raise TitaError(
            "no endpoint to ask", where="recipe", remedy="give --set base_url=http://..."
        )
    with tempfile.TemporaryDirectory(dir=settings().scratch_dir) as scratch:
        folder = Path(scratch) / "results"
        folder.mkdir()
        tasks = _tasks(recipe, folder=folder)
        with _kept_between_pods(tasks, store=store, run_id=run_id):
            for task in tasks:
                say(f"weight {task.generation.weight:g}")
                _ask(task, recipe, run_id=run_id)
            evaluation = evaluate(folder)
            if not any(run["num_answered"] for run in evaluation.report["runs"]):
                raise JobFailed("no question was answered", where=recipe.base_url)
            broken = _broken_gates(recipe, evaluation, store=store)
            entry = publish(
                evaluation,
                folder=folder,
                images=tasks[0].images,
                store=store,
                good=not broken and _is_sound(evaluation),
            )
    say(f"published report {entry['id']} to {store.uri}")
    if broken:
        raise JobFailed("; ".join(broken), where=f"report {entry['id']}")
    return entry


def _tasks(recipe: BenchmarkRecipe, *, folder: Path) -> list[BenchmarkTask]:
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
        generation=GenerationOptions(max_new_tokens=recipe.max_new_tokens),
    )
    # A release whose own weight is 0 names it twice.
    return sweep_tasks(task, weights=list(dict.fromkeys(recipe.weights)), model=recipe.model)


def _ask(task: BenchmarkTask, recipe: BenchmarkRecipe, *, run_id: str) -> None:
    assert recipe.base_url is not None
    run_endpoint(
        task,
        name=recipe.model,
        model=RegisteredModel(id=recipe.model),
        base_url=recipe.base_url.rstrip("/"),
        key=_key(),
        manners=ClientOptions(concurrency=recipe.concurrency, timeout_s=recipe.timeout_s),
        extra={"job": run_id},
    )


def _key() -> SecretStr | None:
    """The first of the keys that the release's own server accepts."""
    keys = settings().api_keys
    first = keys.get_secret_value().split(",")[0].strip() if keys else ""
    return SecretStr(first) if first else None


@contextlib.contextmanager
def _kept_between_pods(
    tasks: Sequence[BenchmarkTask], *, store: Store, run_id: str
) -> Iterator[None]:
    """Bring back what an earlier pod of this run had answered, and leave it for a later one."""
    keys = {task.out: f"{REPORTS}/partial/{run_id}/{task.out.name}" for task in tasks}
    for path, key in keys.items():
        if store.exists(key):
            path.write_bytes(store.get(key))
            say(f"carrying on with {key}")
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


def _is_sound(evaluation: Evaluation) -> bool:
    return all(run["success_rate"] >= _GOOD_SUCCESS_RATE for run in evaluation.report["runs"])


def _broken_gates(recipe: BenchmarkRecipe, evaluation: Evaluation, *, store: Store) -> list[str]:
    """Hold each run against the same run of the last good report."""
    if recipe.fail_below is None and recipe.fail_slower is None:
        return []
    try:
        good = find_report("last-good", store=store)
    except TitaError:
        say("no good report yet to hold this one against")
        return []
    earlier = _runs_of_report(fetch(good, store=store), good)
    broken = []
    for run in evaluation.runs:
        before = next((old for old in earlier if _same(old, run)), None)
        if before is None:
            say(f"{run.title}: report {good['id']} has no run of this protocol")
            continue
        summary = compare(before, run).summary
        texts = gate(summary, fail_below=recipe.fail_below, fail_slower=recipe.fail_slower)
        broken += [f"{run.title} against {good['id']}: {text}" for text in texts]
    return broken


def _runs_of_report(folder: Path, entry: dict[str, Any]) -> list[BenchmarkRun]:
    return [
        run for name in {run["file"] for run in entry["runs"]} for run in runs_of(folder / name)
    ]


def _same(old: BenchmarkRun, new: BenchmarkRun) -> bool:
    return dict(old.protocol) == dict(new.protocol)
