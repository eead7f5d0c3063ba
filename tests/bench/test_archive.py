"""Reports in a directory store, `tita reports`, and the nightly job with its gates."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tita.bench import job
from tita.bench.archive import fetch, find_report, read_index
from tita.bench.chat_response import Reply
from tita.bench.evaluate import evaluate
from tita.bench.job import run_job
from tita.bench.publish import publish
from tita.bench.questions import BenchmarkItem, write_items
from tita.bench.results_file import ResultsFile, answer_record, read_results
from tita.errors import JobFailed, TitaError
from tita.recipes import BenchmarkRecipe
from tita.storage import Store, open_store
from tita.storage.manifest import sha256_of


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def results_in(folder: Path, *, num_right: int, **run: Any) -> Path:
    """Write 20 questions and their results, `num_right` of them correct."""
    folder.mkdir(parents=True, exist_ok=True)
    items = [
        BenchmarkItem(id=f"q{n}", text="What?", references=("x",), metric="exact")
        for n in range(20)
    ]
    write_items(folder / "questions.jsonl", items)
    fields = {"model_name": "m", "weight": 0.3} | run
    fields["questions_sha256"] = sha256_of(folder / "questions.jsonl")
    with ResultsFile(folder / "m.jsonl", run=fields) as results:
        for number, item in enumerate(items):
            reply = Reply(text="x" if number < num_right else "y", response_time_s=0.1)
            results.append(answer_record(item, reply, attempts=1, run=fields))
    return folder


def test_a_published_report_is_found_fetched_and_verified(store: Store, tmp_path: Path) -> None:
    folder = results_in(tmp_path / "a", num_right=15, reward_sha256="feed" * 16, run="dpo-7")
    entry = publish(evaluate(folder), folder=folder, images=folder, store=store, good=True)
    assert read_index(store) == [entry]
    assert entry["scores"][0]["score"] == 75
    assert entry["points_to"]["reward_sha256"] == ["feed" * 16]
    assert entry["points_to"]["questions_sha256"] == [sha256_of(folder / "questions.jsonl")]
    for name in (entry["id"], entry["id"][:17], "latest", "last-good"):
        assert find_report(name, store=store) == entry
    for about in ("feed", "dpo-7", "m", "m w=0.3"):
        assert read_index(store, about=about) == [entry]
    assert read_index(store, about="other") == []
    manifest = store.read_manifest(f"reports/{entry['id']}")
    assert manifest is not None
    assert manifest.meta["points_to"] == entry["points_to"], "the manifest has the pointers too"
    fetched = fetch(entry, store=store, into=tmp_path / "fetched")
    assert (fetched / "m.jsonl").read_bytes() == (folder / "m.jsonl").read_bytes()
    assert (fetched / "questions.jsonl").is_file()
    assert evaluate(fetched).report["runs"][0]["scores"][0]["values"]["score"] == 75


def test_a_changed_report_is_not_fetched(store: Store, tmp_path: Path) -> None:
    folder = results_in(tmp_path / "a", num_right=15)
    entry = publish(evaluate(folder), folder=folder, images=folder, store=store)
    (folder / "m.jsonl").write_text("better\n")
    store.push_tree(folder, f"reports/{entry['id']}")
    with pytest.raises(TitaError, match="changed after it was indexed"):
        fetch(entry, store=store, into=tmp_path / "fetched")


def test_history_of_earlier_reports_is_plotted(store: Store, tmp_path: Path) -> None:
    for number in (10, 15, 20):
        folder = results_in(tmp_path / str(number), num_right=number)
        publish(evaluate(folder), folder=folder, images=folder, store=store)
    html = (tmp_path / "20" / "report.html").read_text()
    assert "Scores of earlier reports" in html
    assert "Scores of earlier reports" not in (tmp_path / "10" / "report.html").read_text()


def test_ambiguous_and_unknown_report_names_are_rejected(store: Store, tmp_path: Path) -> None:
    for number in (10, 15):
        folder = results_in(tmp_path / str(number), num_right=number)
        publish(evaluate(folder), folder=folder, images=folder, store=store, good=False)
    with pytest.raises(TitaError, match="several reports begin with '20'"):
        find_report("20", store=store)
    with pytest.raises(TitaError, match="no report 'last-good'"):
        find_report("last-good", store=store)


def tita(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tita", "reports", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.slow
def test_eval_publishes_and_reads_from_the_store(
    store: Store, tmp_path: Path, tita_bench: Callable[..., Any]
) -> None:
    import os

    folder = results_in(tmp_path / "a", num_right=15)
    env = {**os.environ, "TITA_STORE": store.uri}
    published = tita_bench("eval", "--dir", folder, "--publish", env=env)
    assert published.returncode == 0, published.stderr
    (entry,) = read_index(store)
    assert f"published report {entry['id']}" in published.stderr
    where = f"reports/{entry['id']}"
    refused = tita_bench("eval", "--dir", where, env=env)
    assert refused.returncode == 2
    assert "give --out" in refused.stderr
    again = tita_bench("eval", "--dir", where, "--out", tmp_path / "again", env=env)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again" / "report.html").is_file()
    compared = tita_bench("compare", f"{where}/m.jsonl", folder / "m.jsonl", env=env)
    assert compared.returncode == 0, compared.stderr
    assert "20 shared" in compared.stdout


@pytest.mark.slow
def test_reports_command(store: Store, tmp_path: Path) -> None:
    folder = results_in(tmp_path / "a", num_right=15)
    entry = publish(evaluate(folder), folder=folder, images=folder, store=store, good=True)
    listed = tita("list", "--store", store.uri, "-o", "json")
    assert json.loads(listed.stdout) == [entry], listed.stderr
    table = tita("list", "--store", store.uri, "--about", "m")
    assert entry["id"] in table.stdout
    shown = tita("show", "--store", store.uri)
    assert shown.stdout == (folder / "benchmark_report.txt").read_text()
    fetched = tita("fetch", "latest", "--store", store.uri, "--into", tmp_path / "f")
    assert fetched.stdout.strip() == str(tmp_path / "f"), fetched.stderr
    assert (tmp_path / "f" / "report.html").is_file()
    unknown = tita("show", "nope", "--store", store.uri)
    assert unknown.returncode == 2
    assert "no report 'nope'" in unknown.stderr


@pytest.fixture
def recipe(endpoint: Any, ask_file: Any) -> Callable[..., BenchmarkRecipe]:
    def make(*texts: str, **fields: Any) -> BenchmarkRecipe:
        questions = ask_file(*texts, references=["x"], metric="exact")
        return BenchmarkRecipe(
            base_url=endpoint.base_url, questions=str(questions), model="m", **fields
        )

    return make


def test_the_job_asks_with_both_weights_and_publishes(
    recipe: Callable[..., BenchmarkRecipe], store: Store, endpoint: Any
) -> None:
    entry = run_job(recipe("say:x;", "say:y;"), store=store, run_id="night-1")
    assert [run["title"] for run in entry["runs"]] == ["m w=0", "m w=0.3"]
    assert [score["score"] for score in entry["scores"]] == [50, 50]
    assert entry["good"] is True
    assert sorted(a["guidance_weight"] for a in endpoint.asked()) == [0, 0, 0.3, 0.3]
    assert list(store.list("reports/partial/")) == []


def test_the_job_uses_sample_questions_by_default(store: Store, endpoint: Any) -> None:
    recipe = BenchmarkRecipe(base_url=endpoint.base_url, weights=(0.0,), max_questions=3)
    entry = run_job(recipe, store=store, run_id="night-1")
    assert entry["runs"][0]["num_questions"] == 3


def test_the_gate_compares_with_the_last_good_report(
    recipe: Callable[..., BenchmarkRecipe], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = ["say:x;"] * 3
    texts = [f"{text} {n}" for n, text in enumerate(questions)]
    gated = {"fail_below": -5.0, "weights": (0.0,)}
    first = run_job(recipe(*texts, **gated), store=store, run_id="night-1")
    same = run_job(recipe(*texts, **gated), store=store, run_id="night-2")
    assert same["good"] is True
    # The model gets worse on the same questions.
    original = job.run_endpoint

    def worse(task: Any, *arguments: Any, **options: Any) -> Any:
        stats = original(task, *arguments, **options)
        task.out.write_text(task.out.read_text().replace('"response": "x"', '"response": "y"'))
        return stats

    monkeypatch.setattr(job, "run_endpoint", worse)
    with pytest.raises(JobFailed, match=r"score difference -100\.00 is below -5"):
        run_job(recipe(*texts, **gated), store=store, run_id="night-3")
    entries = read_index(store)
    assert [entry["good"] for entry in entries] == [True, True, False]
    assert find_report("last-good", store=store)["id"] == same["id"] != first["id"]


def test_a_second_pod_asks_only_unanswered_questions(
    recipe: Callable[..., BenchmarkRecipe],
    store: Store,
    endpoint: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = recipe("say:x; 0", "say:x; 1", "say:x; 2", weights=(0.3,))
    original = job.run_endpoint

    def killed(task: Any, *arguments: Any, **options: Any) -> Any:
        original(job.BenchmarkTask(**{**_fields(task), "limit": 2}), *arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "run_endpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        run_job(made, store=store, run_id="night-1")
    assert len(list(store.list("reports/partial/night-1/"))) == 1
    monkeypatch.setattr(job, "run_endpoint", original)
    entry = run_job(made, store=store, run_id="night-1")
    assert len(endpoint.asked()) == 3, "two by the first pod, one by the second"
    fetched = fetch(entry, store=store)
    assert len(list(read_results(fetched / "m_w0.3.jsonl"))) == 3
    assert list(store.list("reports/partial/")) == []


def _fields(task: Any) -> dict[str, Any]:
    return {name: getattr(task, name) for name in ("questions", "images", "out", "generation")}


def test_no_report_is_published_without_answers(
    recipe: Callable[..., BenchmarkRecipe], store: Store
) -> None:
    with pytest.raises(JobFailed, match="no question was answered"):
        run_job(recipe("script:400"), store=store, run_id="night-1")
    assert read_index(store) == []


@pytest.mark.slow
def test_the_module_runs_with_the_environment_of_a_pod(
    endpoint: Any, ask_file: Any, store: Store, tmp_path: Path
) -> None:
    import os

    recipe = {"base_url": endpoint.base_url, "questions": str(ask_file("say:x;")), "weights": [0]}
    env = {
        **os.environ, "TITA_STORE": store.uri, "TITA_RUN": "night-1",
        "TITA_RECIPE": json.dumps(recipe), "TITA_API_KEYS": "sk-one,sk-two",
    }  # fmt: skip
    command = [sys.executable, "-m", "tita.bench"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(read_index(store)) == 1
    assert endpoint.asked()[0]["key"] == "Bearer sk-one"
    assert "sk-one" not in done.stderr
    env["TITA_RECIPE"] = "{}"
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no endpoint; give --set base_url" in done.stderr


@pytest.mark.slow
def test_tita_benchmark_writes_its_termination_message(
    endpoint: Any, ask_file: Any, store: Store, tmp_path: Path
) -> None:
    import os

    env = {
        **os.environ, "TITA_STORE": store.uri, "TITA_RUN": "night-1",
        "TITA_TERMINATION_LOG": str(tmp_path / "last-word"),
    }  # fmt: skip
    command = [sys.executable, "-m", "tita", "benchmark"]
    wanted = [f"--set=base_url={endpoint.base_url}", f"--set=questions={ask_file('script:400')}"]
    done = subprocess.run([*command, *wanted], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 69
    assert "no question was answered" in done.stderr
    word = json.loads((tmp_path / "last-word").read_text())
    assert word["exit_code"] == 69
    assert "no question was answered" in word["error"]
    wrong = subprocess.run(
        [*command, "--set=weigths=[0]"], env=env, capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert "did you mean 'weights'?" in wrong.stderr
