"""The benchmark job: readiness, questions asked again, gates, and a model that changes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tita.bench import job
from tita.bench.archive import fetch, find_report, read_index
from tita.bench.endpoint import EndpointUnavailable
from tita.bench.evaluate import Evaluation
from tita.bench.job import run_job
from tita.bench.results_file import read_results
from tita.bench.worker_pool import ModelChanged
from tita.errors import ExitCode, GateMissed, Incomplete, Preempted, TitaError
from tita.recipes import BenchmarkRecipe
from tita.storage import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def recipe(ask_file: Any) -> Callable[..., BenchmarkRecipe]:
    def make(endpoint: Any, *texts: str, name: str = "q.jsonl", **fields: Any) -> BenchmarkRecipe:
        questions = ask_file(*texts, name=name, references=["x"], metric="exact")
        return BenchmarkRecipe(
            base_url=endpoint.base_url, questions=str(questions), model="m", **fields
        )

    return make


def report_text(store: Store) -> str:
    folder = fetch(find_report("latest", store=store), store=store)
    return (folder / "benchmark_report.txt").read_text()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_the_job_waits_until_the_server_is_ready(
    start_endpoint: Any, recipe: Any, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint = start_endpoint("--loading", "1")
    entry = run_job(recipe(endpoint, "say:x;"), store=store, run_id="n")
    assert entry["good"] is True
    assert [run["success_rate"] for run in entry["runs"]] == [1, 1]
    said = capsys.readouterr().err
    assert f"waiting for {endpoint.base_url}: HTTP 503" in said
    assert f"{endpoint.base_url} is ready after" in said


def test_waiting_is_bounded_and_names_the_server(ask_file: Any, store: Store) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    away = BenchmarkRecipe(base_url=url, questions=str(ask_file("x")), wait_ready_s=0.2)
    with pytest.raises(EndpointUnavailable, match="not ready after") as failed:
        run_job(away, store=store, run_id="n")
    assert failed.value.where == url
    assert failed.value.exit_code == ExitCode.RETRY
    assert "tita doctor" in str(failed.value)


def test_questions_without_an_answer_are_asked_again(
    endpoint: Any, recipe: Any, store: Store
) -> None:
    # HTTP 400 is not retried within one round.
    made = recipe(endpoint, "say:x; script:400,400,ok", "say:x;", weights=(0.0,))
    entry = run_job(made, store=store, run_id="n")
    assert entry["runs"][0]["success_rate"] == 1
    assert entry["good"] is True
    assert len(endpoint.asked()) == 4


def test_too_many_questions_without_an_answer_are_incomplete(
    endpoint: Any, recipe: Any, store: Store
) -> None:
    made = recipe(endpoint, "script:400", *(f"say:x; {n}" for n in range(9)), weights=(0.0,))
    with pytest.raises(
        Incomplete, match=r"more than 2 % .* \(m w=0\): 1 x HTTP 400, such as 'HTTP 400: no"
    ) as failed:
        run_job(made, store=store, run_id="n")
    assert failed.value.exit_code == 69
    (entry,) = read_index(store)
    assert (entry["good"], entry["runs"][0]["success_rate"]) == (False, 0.9)
    assert "INCOMPLETE: m w=0" in report_text(store).splitlines()[2]
    assert list(store.list("reports/partial/")) == []
    allowed = made.model_copy(update={"max_missing": 0.1})
    assert run_job(allowed, store=store, run_id="n")["good"] is False, "not to be compared with"


def test_guided_answers_are_compared_with_the_base_by_default(
    endpoint: Any, recipe: Any, store: Store
) -> None:
    texts = [f"script:byweight {n}" for n in range(3)]
    with pytest.raises(
        GateMissed, match=r"m w=0\.3 against weight 0: score difference -100\.00 is below -5"
    ) as missed:
        run_job(recipe(endpoint, *texts), store=store, run_id="n")
    assert missed.value.exit_code == 10
    (entry,) = read_index(store)
    assert entry["good"] is False
    assert entry["job"] == "n"
    assert report_text(store).splitlines()[2].startswith("GATE MISSED: m w=0.3 against weight 0")
    for bound in (None, -100.0):
        made = recipe(endpoint, *texts, fail_below_base=bound)
        assert run_job(made, store=store, run_id="n")["good"] is True


def test_the_sample_questions_say_that_they_prove_nothing(endpoint: Any, store: Store) -> None:
    sample = {"base_url": endpoint.base_url, "model": "m", "max_questions": 5}
    entry = run_job(BenchmarkRecipe(**sample), store=store, run_id="n")
    assert entry["good"] is True
    text = report_text(store)
    assert "Gate not checked: m w=0.3 against weight 0: the sample questions prove" in text
    assert "Their scores prove nothing" in text
    folder = fetch(entry, store=store)
    assert "Their scores prove nothing" in (folder / "report.html").read_text()
    # A gate that was asked for is checked all the same.
    with pytest.raises(GateMissed, match="is below \\+1"):
        run_job(BenchmarkRecipe(**sample, fail_below_base=1.0), store=store, run_id="n")


def test_a_report_is_compared_with_one_on_the_same_questions(
    endpoint: Any, recipe: Any, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    gated = {"fail_below": -5.0, "weights": (0.0,)}
    worse = ("script:ok,parts say:x; 1", "script:ok,parts say:x; 2")
    one = run_job(recipe(endpoint, *worse, **gated), store=store, run_id="n1")
    other = run_job(recipe(endpoint, "say:x;", name="o.jsonl", **gated), store=store, run_id="n2")
    assert "m w=0: there is no good report on the same questions" in capsys.readouterr().err
    assert (one["good"], other["good"]) == (True, True)
    assert find_report("last-good", store=store)["id"] == other["id"]
    with pytest.raises(GateMissed, match=rf"m w=0 against {one['id']}: score difference -100"):
        run_job(recipe(endpoint, *worse, **gated), store=store, run_id="n3")


def test_times_of_another_load_skip_the_latency_gate_with_a_notice(
    endpoint: Any, recipe: Any, store: Store
) -> None:
    def nightly(run_id: str, concurrency: int) -> dict[str, Any]:
        made = recipe(
            endpoint, "say:x; 1", "say:x; 2", weights=(0.0,), fail_slower=1e-9, fail_below=-5.0,
            concurrency=concurrency,
        )  # fmt: skip
        return run_job(made, store=store, run_id=run_id)

    one = nightly("n1", 1)
    assert nightly("n2", 2)["good"] is True
    notice = f"Gate not checked: m w=0 against {one['id']}: fail_slower, because the times are of"
    assert f"{notice} different loads: A was measured at concurrency 1, B at" in report_text(store)
    # The next run of this load has one to be compared with.
    with pytest.raises(GateMissed, match=r"response time ratio .* is above 1e-09"):
        nightly("n3", 2)


def rows_of(entry: dict[str, Any], store: Store) -> list[dict[str, Any]]:
    folder = fetch(entry, store=store)
    names = [run["file"] for run in entry["runs"]]
    return [row for name in names for row in read_results(folder / name)]


def test_a_model_that_changes_is_measured_again_and_never_mixed(
    start_endpoint: Any, recipe: Any, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint = start_endpoint("--models")
    texts = [f"script:model {n}" for n in range(9)]
    texts[5] = "script:model,swap,model 5"  # during the second weight
    made = recipe(endpoint, *texts, fail_below_base=None, concurrency=3)
    entry = run_job(made, store=store, run_id="n")
    rows = rows_of(entry, store)
    assert len(rows) == 18
    assert {row["model_digest"] for row in rows} == {"model-2"}
    assert {row["response"] for row in rows} == {"model-2"}
    assert entry["points_to"]["model_digest"] == ["model-2"]
    said = capsys.readouterr().err
    assert "the model changed: answers now come from model model-2, not from model model-1" in said


def test_a_model_that_changes_all_the_time_ends_the_benchmark(
    start_endpoint: Any, recipe: Any, store: Store
) -> None:
    endpoint = start_endpoint("--models")
    texts = ["script:swap", *(f"script:model {n}" for n in range(4))]
    made = recipe(endpoint, *texts, weights=(0.0,), concurrency=1)
    with pytest.raises(ModelChanged):
        run_job(made, store=store, run_id="n")
    assert read_index(store) == []


def test_a_model_that_changes_between_weights_is_measured_again(
    start_endpoint: Any, recipe: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = start_endpoint("--models")
    made = recipe(endpoint, "script:model", fail_below_base=None)
    original, num_asked = job.run_endpoint, 0

    def swap_after_the_first(task: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal num_asked
        stats = original(task, *arguments, **options)
        num_asked += 1
        if num_asked == 1:
            body = {"messages": [{"role": "user", "content": "script:swap"}]}
            httpx.post(f"{endpoint.base_url}/chat/completions", json=body)
        return stats

    monkeypatch.setattr(job, "run_endpoint", swap_after_the_first)
    rows = rows_of(run_job(made, store=store, run_id="n"), store)
    assert [row["response"] for row in rows] == ["model-2", "model-2"]
    assert num_asked == 4


def test_a_second_pod_discards_answers_of_another_model(
    start_endpoint: Any, recipe: Any, store: Store
) -> None:
    endpoint = start_endpoint("--models")
    texts = ["script:model 1", "script:model 2"]
    made = recipe(endpoint, *texts, weights=(0.0,))
    older = {"question_id": "q0", "model_name": "m", "response": "model-0", "success": True}
    line = json.dumps({**older, "model_digest": "model-0"})
    store.put("reports/partial/n/m_w0.jsonl", f"{line}\n".encode())
    rows = rows_of(run_job(made, store=store, run_id="n"), store)
    assert sorted(row["response"] for row in rows) == ["model-1", "model-1"]


@pytest.mark.slow
def test_run_stops_at_another_model_and_keeps_the_first(
    start_endpoint: Any, ask_file: Any, tita_bench: Callable[..., Any], tmp_path: Path
) -> None:
    endpoint = start_endpoint("--models")
    texts = [f"script:model {n}" for n in range(12)]
    texts[6] = "script:swap"
    out = tmp_path / "r.jsonl"
    command = (
        "run", "--questions", ask_file(*texts), "--base-url", endpoint.base_url, "--model", "m",
        "--concurrency", 1, "--out", out,
    )  # fmt: skip
    stopped = tita_bench(*command)
    assert stopped.returncode == 1
    assert "answers now come from model model-2, not from model model-1; the 6 answers" in (
        stopped.stderr
    )
    assert "give another --out to measure the new model" in stopped.stderr
    assert [row["response"] for row in read_results(out)] == ["model-1"] * 6
    again = tita_bench(*command)
    assert again.returncode == 2
    assert "answers with model_digest 'model-1', not 'model-2'; choose another --out" in (
        again.stderr
    )
    evaluated = tita_bench("eval", "--dir", tmp_path)
    assert "INCOMPLETE: m (r.jsonl) has no answer to 6 of 12 questions: 6 not asked" in (
        evaluated.stdout
    )


def test_answers_of_an_interrupted_run_to_other_questions_are_not_taken(
    endpoint: Any, recipe: Any, store: Store
) -> None:
    """The name of a run on one machine is always `benchmark`."""
    line = {"question_id": "q0", "model_name": "m", "response": "y", "success": True}
    kept = json.dumps(line | {"weight": 0.0, "questions_sha256": "other"})
    store.put("reports/partial/n/m_w0.jsonl", f"{kept}\n".encode())
    made = recipe(endpoint, "say:x;", weights=(0.0,))
    assert run_job(made, store=store, run_id="n")["scores"][0]["score"] == 100
    assert len(endpoint.asked()) == 1


def test_sigterm_while_the_report_is_made_keeps_the_answers(
    endpoint: Any, recipe: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, evaluate = signal.getsignal(signal.SIGTERM), job.evaluate

    def interrupted(folder: Path) -> Evaluation:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(folder)

    made = recipe(endpoint, "say:x;", weights=(0.0,))
    monkeypatch.setattr(job, "evaluate", interrupted)
    with pytest.raises(Preempted, match="the answers so far are written"):
        run_job(made, store=store, run_id="n")
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    assert run_job(made, store=store, run_id="n")["good"] is True
    assert len(endpoint.asked()) == 1, "the answer is kept"


@pytest.mark.slow
def test_at_the_deadline_the_termination_message_names_the_server(
    ask_file: Any, store: Store, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    env = {
        **os.environ, "TITA_STORE": store.uri, "TITA_RUN": "n",
        "TITA_TERMINATION_LOG": str(tmp_path / "last-word"),
    }  # fmt: skip
    questions = ask_file("say:x;")
    process = subprocess.Popen(
        [sys.executable, "-m", "tita", "benchmark", f"--set=base_url={url}",
         f"--set=questions={questions}"],
        env=env, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "waiting for" in line:
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == ExitCode.RETRY, rest
    word = json.loads((tmp_path / "last-word").read_text())
    assert url in word["error"]
    assert "waiting for the server" in word["error"]


def test_a_recipe_without_an_endpoint_is_refused(store: Store) -> None:
    with pytest.raises(TitaError, match="no endpoint"):
        run_job(BenchmarkRecipe(), store=store, run_id="n")


def test_the_docs_list_every_key_of_the_recipe_with_its_default() -> None:
    text = (Path(__file__).parents[2] / "docs" / "benchmark.md").read_text()
    table = text.split("`tita launch benchmark --set", 1)[1].split("|---|---|---|\n")[1]
    rows = [line.split(" | ") for line in table.split("\n\n")[0].splitlines()]
    shown = {key: row[1] for row in rows for key in re.findall(r"`(\w+)`", row[0])}
    assert shown.keys() == BenchmarkRecipe.model_fields.keys()
    numbers = {
        key: float(value) for key, value in shown.items() if re.match(r"-?\d+(\.\d+)?$", value)
    }
    assert len(numbers) >= 6
    assert numbers == {key: getattr(BenchmarkRecipe(), key) for key in numbers}


def test_the_job_sends_the_first_key_of_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its default weights, comments, and the keys on other lines."""
    monkeypatch.setenv("TITA_API_KEYS", "# customers\nfirst faithful=0.3 brief=0\nsecond,third")
    found = job._first_api_key()
    assert found is not None
    assert found.get_secret_value() == "first"


def test_the_weights_of_several_reward_models_are_compared_with_the_base(
    endpoint: Any, recipe: Any, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = (0.0, {"faithful": 0.2, "brief": 0.1}, 0.0)
    made = recipe(endpoint, "script:byweight", weights=weights)
    title = "m brief=0.1+faithful=0.2"
    with pytest.raises(GateMissed, match=rf"{re.escape(title)} against weight 0: score diff"):
        run_job(made, store=store, run_id="n")
    asked = [{key: body.get(key) for key in ("guidance_weight", "guidance_weights")}
             for body in endpoint.asked()]  # fmt: skip
    assert asked == [
        {"guidance_weight": 0.0, "guidance_weights": None},
        {"guidance_weight": None, "guidance_weights": {"faithful": 0.2, "brief": 0.1}},
    ]
    assert "weight faithful=0.2+brief=0.1" in capsys.readouterr().err
    (entry,) = read_index(store)
    assert [run["title"] for run in entry["runs"]] == ["m w=0", title]
