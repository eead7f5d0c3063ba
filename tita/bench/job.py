"""The benchmark job: wait for the inference Service, ask it, publish a report, check the gates."""

import contextlib
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import SecretStr

from tita.bench.archive import REPORTS
from tita.bench.compare import missing_share
from tita.bench.endpoint import EndpointUnavailable, model_links
from tita.bench.evaluate import Evaluation, evaluate
from tita.bench.gates import GateResults, check_all_gates
from tita.bench.load_shape import ClientOptions
from tita.bench.publish import publish
from tita.bench.questions import image_folder, question_file
from tita.bench.readiness import not_ready_reason, wait_until_ready
from tita.bench.registry import ModelEndpoint, RegisteredModel
from tita.bench.request_body import GenerationOptions
from tita.bench.results_file import read_results
from tita.bench.sample import write_sample
from tita.bench.tasks import BenchmarkTask, run_endpoint, sweep_tasks, weights_title
from tita.bench.worker_pool import ModelChanged
from tita.errors import GateMissed, Incomplete, Preempted, TitaError
from tita.recipes import BenchmarkRecipe
from tita.records import parse_api_keys
from tita.settings import settings
from tita.storage import Store
from tita.terminal import say

_GOOD_SUCCESS_RATE = 0.99
"""Minimum success rate of a report that later reports are compared with."""
_NUM_ROUNDS = 3
"""Number of times that a question without an answer is asked."""
_MAX_MODEL_CHANGES = 2
_MODEL_FIELDS = ("model_digest", "base_sha256", "reward_sha256")
_TASK_FIELDS = ("model_name", "questions_sha256", "max_new_tokens")


def run_job(recipe: BenchmarkRecipe, *, store: Store, run_id: str) -> dict[str, Any]:
    """Ask all questions with every weight of the recipe, publish a report, and check the gates.

    Returns:
        The report's index entry.

    Raises:
        GateMissed: a gate was missed, after the report was published.
        Incomplete: too many questions have no answer, after the report was published; or none has
            one, without a report.
        EndpointUnavailable: the endpoint is not ready in time; the answers so far are saved.
        ModelChanged: the endpoint's model changed too often during the benchmark.
        Preempted: SIGTERM was received; the answers so far are saved.
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
    with tempfile.TemporaryDirectory(dir=settings().scratch_dir) as scratch:
        folder = Path(scratch) / "results"
        folder.mkdir()
        tasks = _build_tasks(recipe, folder=folder)
        with _preempted_by_sigterm(), _resumable(tasks, store=store, run_id=run_id):
            _measure(recipe, tasks, endpoint, run_id=run_id)
            evaluation = evaluate(folder)
            runs = evaluation.report["runs"]
            if not any(run["num_answered"] for run in runs):
                raise Incomplete(
                    f"no question was answered: {_errors(evaluation)}", where=recipe.base_url
                )
            gates = check_all_gates(recipe, evaluation.runs, store=store)
            incomplete = [
                run.title for run in evaluation.runs if missing_share(run) > recipe.max_missing
            ]
            is_reliable = all(run["success_rate"] >= _GOOD_SUCCESS_RATE for run in runs)
            entry = publish(
                _with_gates(evaluation, gates),
                folder=folder,
                images=tasks[0].images,
                store=store,
                good=not gates.missed and not incomplete and is_reliable,
                job=run_id,
            )
    say(f"published report {entry['id']} to {store.uri}")
    for text in gates.unchecked:
        say(f"gate not checked: {text}")
    where = f"report {entry['id']}"
    if incomplete:
        raise Incomplete(
            f"more than {100 * recipe.max_missing:g} % of the questions have no answer "
            f"({', '.join(incomplete)}): {_errors(evaluation)}",
            where=where,
            remedy="check the server, then launch the benchmark again",
        )
    if gates.missed:
        raise GateMissed("; ".join(gates.missed), where=where)
    return entry


def _measure(
    recipe: BenchmarkRecipe, tasks: Sequence[BenchmarkTask], endpoint: ModelEndpoint, *, run_id: str
) -> None:
    """Ask every question until it has an answer, all of them answered by one model."""
    options = ClientOptions(concurrency=recipe.concurrency, timeout_s=recipe.timeout_s)
    num_changes = 0
    round_number = 1
    while round_number <= _NUM_ROUNDS:
        wait_until_ready(endpoint, timeout_s=recipe.wait_ready_s)
        num_failed = 0
        try:
            _discard_other_answers(tasks, endpoint)
            for task in tasks:
                given = task.generation.weights or task.generation.weight or 0.0
                say(f"weight {weights_title(given)}")
                stats = run_endpoint(task, endpoint, options=options, extra={"job": run_id})
                num_failed += stats.num_failed
            if _discard_other_answers(tasks, endpoint):
                raise ModelChanged("the model changed between the weights", where=endpoint.base_url)
        except ModelChanged as change:
            num_changes += 1
            if num_changes > _MAX_MODEL_CHANGES:
                raise
            say(f"{change.what}; the questions are asked again")
            continue
        except EndpointUnavailable as away:
            if round_number == _NUM_ROUNDS:
                raise
            say(f"{away.where}: {away.what}")
            round_number += 1
            continue
        except Preempted as stop:
            reason = not_ready_reason(endpoint)
            if not reason:
                raise
            raise EndpointUnavailable(
                f"{stop.what}; the server is away ({reason})",
                where=endpoint.base_url,
                remedy="check the server with `tita doctor`",
            ) from None
        if not num_failed:
            return
        round_number += 1
        if round_number <= _NUM_ROUNDS:
            say(f"{num_failed} questions have no answer; asking them again")


def _discard_other_answers(tasks: Sequence[BenchmarkTask], endpoint: ModelEndpoint) -> int:
    """Delete answers of other models than the endpoint serves now, or to other questions.

    A run of the same name may have been interrupted with another recipe.

    Returns:
        The number of files.
    """
    served = model_links(endpoint.base_url, model_id=endpoint.model.id, key=endpoint.key)
    num_files = 0
    for task in tasks:
        first = next(read_results(task.out), {}) if task.out.exists() else {}
        wanted = {**task.protocol(model_name=endpoint.name), **served}
        keys = [key for key in (*_MODEL_FIELDS, *_TASK_FIELDS) if key in wanted and key in first]
        if any(first[key] != wanted[key] for key in keys):
            say(f"{task.out.name} has answers of another model or to other questions; asking again")
            task.out.unlink()
            num_files += 1
    return num_files


def _with_gates(evaluation: Evaluation, gates: GateResults) -> Evaluation:
    """The evaluation with the results of the gates first among its notes."""
    notes = [f"GATE MISSED: {text}" for text in gates.missed]
    notes += [f"Gate not checked: {text}" for text in gates.unchecked]
    report = {**evaluation.report, "notes": [*notes, *evaluation.report["notes"]]}
    return replace(evaluation, report=report)


def _errors(evaluation: Evaluation) -> str:
    """The errors of all runs with their counts, and a message of the most frequent kind."""
    counts: dict[str, int] = {}
    messages: dict[str, str] = {}
    for run in evaluation.report["runs"]:
        for kind, count in run["errors"].items():
            counts[kind] = counts.get(kind, 0) + count
        messages = run["error_messages"] | messages
    text = ", ".join(f"{count} x {kind}" for kind, count in counts.items() if count)
    if not text:
        return "not asked"
    most = max(counts, key=lambda kind: counts[kind])
    return text if messages[most] == most else f"{text}, such as {messages[most]!r}"


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
        metric=recipe.metric,
        ignore_columns=recipe.ignore_columns,
        generation=GenerationOptions(max_new_tokens=recipe.max_new_tokens),
    )
    return sweep_tasks(task, weights=recipe.weights, model=recipe.model)


def _first_api_key() -> SecretStr | None:
    """The first API key that the release's server accepts."""
    secret = settings().api_keys
    if secret is None or not secret.get_secret_value().strip():
        return None
    return SecretStr(parse_api_keys(secret.get_secret_value(), where="TITA_API_KEYS")[0].key)


@contextlib.contextmanager
def _preempted_by_sigterm() -> Iterator[None]:
    """SIGTERM is `Preempted` between requests and while the report is made, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_: int, __: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one does not stop the saving
        raise Preempted("SIGTERM received; the answers so far are written")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
