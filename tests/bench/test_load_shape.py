"""Shapes of a load: rates, durations, warm-up requests, fixed lengths, and recorded conditions."""

import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bench.conftest import Scripted
from tita.bench.load_shape import Arrivals, ClientOptions, repeated
from tita.bench.questions import BenchmarkItem
from tita.bench.results_file import read_results

Bench = Callable[..., Any]


@pytest.fixture
def run(tita_bench: Bench, endpoint: Scripted, ask_file: Any, tmp_path: Path) -> Bench:
    """Run `tita-bench run` on five questions."""

    def start(*arguments: Any, out: str = "r.jsonl", **options: Any) -> Any:
        questions = ask_file(
            *(f"say:yes;{n}" for n in range(5)), references=["yes"], metric="exact"
        )
        return tita_bench(
            "run", "--questions", questions, "--out", tmp_path / out, "--model", "m",
            "--base-url", endpoint.base_url, *arguments, **options,
        )  # fmt: skip

    return start


def test_arrivals_have_the_rate_and_the_distribution() -> None:
    constant = ClientOptions(rate=4).intervals_s()
    assert list(itertools.islice(constant, 3)) == [0.25] * 3
    poisson = ClientOptions(rate=4, arrivals=Arrivals.POISSON)
    drawn = list(itertools.islice(poisson.intervals_s(), 20000))
    assert statistics.mean(drawn) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(drawn) == pytest.approx(0.25, rel=0.03), "of an exponential"
    assert drawn[:5] == list(itertools.islice(poisson.intervals_s(), 5)), "seeded"


def test_repetitions_have_ids_of_their_own_and_no_score() -> None:
    items = [BenchmarkItem(id=i, text="t", references=("x",), metric="exact") for i in "ab"]
    again = list(itertools.islice(repeated(items, done={"b", "a#3"}), 5))
    assert [item.id for item in again] == ["a", "a#2", "b#2", "b#3", "a#4"]
    assert [bool(item.metric) for item in again] == [True, False, False, False, False]


def test_a_duration_repeats_the_questions(run: Bench, endpoint: Scripted, tmp_path: Path) -> None:
    done = run("--duration", "2s", "--rate", "20", "--arrivals", "poisson")
    assert done.returncode == 0, done.stderr
    lines = list(read_results(tmp_path / "r.jsonl"))
    # About 40 of 5 questions; a busy machine sends fewer, or later.
    assert 5 < len(lines) < 80
    times = [entry["at"] for entry in endpoint.asked()]
    assert times[-1] - times[0] > 1
    assert sum("scores" in line and line["scores"] is not None for line in lines) == 5
    assert len({line["question_id"] for line in lines}) == len(lines)
    (first, *rest) = lines
    conditions = first["conditions"]
    assert conditions["load"] == {"concurrency": 256, "rate": 20.0, "arrivals": "poisson"}
    assert conditions["options"]["duration_s"] == 2.0
    assert {line["session"] for line in lines} == {conditions["session"]}
    assert not any("conditions" in line for line in rest), "once is enough"
    assert all(abs(line["sent_at"] - first["sent_at"]) < 60 for line in lines)


def test_warm_up_requests_are_not_recorded(run: Bench, endpoint: Scripted, tmp_path: Path) -> None:
    done = run("--warm-up", 7)
    assert done.returncode == 0, done.stderr
    assert len(endpoint.asked()) == 7 + 5
    assert len(list(read_results(tmp_path / "r.jsonl"))) == 5


def test_a_sweep_writes_one_file_per_concurrency(
    run: Bench, endpoint: Scripted, tmp_path: Path
) -> None:
    done = run("--sweep", "1,3", "--key-file", "k", cwd=_with_key(tmp_path))
    assert done.returncode == 0, done.stderr
    for number in (1, 3):
        first = next(read_results(tmp_path / f"r_c{number}.jsonl"))
        assert first["conditions"]["load"] == {"concurrency": number}
        assert "--sweep 1,3 --key-file k" in first["conditions"]["command"]
        assert first["conditions"]["endpoint"] == endpoint.base_url
        assert first["conditions"]["client"]["tita"]
        assert first["conditions"]["machine"]["cpus"]
    assert endpoint.asked()[0]["key"] == "Bearer sk-1"
    assert "sk-1" not in (tmp_path / "r_c1.jsonl").read_text()


def _with_key(folder: Path) -> Path:
    (folder / "k").write_text("sk-1")
    return folder


def test_a_fixed_length_that_is_ignored_is_reported(run: Bench) -> None:
    done = run("--ignore-eos", "--max-new-tokens", 7)
    assert "5 answers of another length than requested" in done.stderr


def test_a_rate_that_is_not_reached_is_reported(
    tita_bench: Bench, start_endpoint: Any, ask_file: Any, tmp_path: Path
) -> None:
    endpoint = start_endpoint(delay=0.3)
    common = (
        "run", "--questions", ask_file(*map(str, range(6))), "--model", "m",
        "--base-url", endpoint.base_url, "--rate", "20",
    )  # fmt: skip
    late = tita_bench(*common, "--out", tmp_path / "a.jsonl", "--concurrency", "1")
    assert "the rate was not reached, give a higher --concurrency" in late.stderr
    on_time = tita_bench(*common, "--out", tmp_path / "b.jsonl")
    assert "late" not in on_time.stderr


def test_a_run_resumed_with_another_load_says_so(run: Bench, tmp_path: Path) -> None:
    run("--max", 2, "--concurrency", 4)
    same = run("--max", 3, "--concurrency", 4)
    assert "another" not in same.stderr
    assert "keep their times apart" not in same.stderr
    other = run("--concurrency", 2)
    assert "measured at concurrency 4; this run is at concurrency 2" in other.stderr
    lines = list(read_results(tmp_path / "r.jsonl"))
    sessions = [line["conditions"]["load"]["concurrency"] for line in lines if "conditions" in line]
    assert sessions == [4, 4, 2]
    old = [{k: v for k, v in line.items() if k not in ("session", "conditions")} for line in lines]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old[:4]))
    older = run()
    assert "measured at a load that was not recorded" in older.stderr
