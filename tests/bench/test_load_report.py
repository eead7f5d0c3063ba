"""Figures of load in reports, comparisons of different loads, and missing images."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from tita.bench.benchmark_report import comparison_page, comparison_text, write_report
from tita.bench.chat_response import Reply
from tita.bench.columns import BenchmarkRun
from tita.bench.compare import check_gates, compare, pair_runs
from tita.bench.evaluate import evaluate, read_runs
from tita.bench.load_figures import distribution, knee, parse_goodput
from tita.bench.load_report import sweeps
from tita.bench.page_images import ImageFolder
from tita.bench.questions import BenchmarkItem
from tita.bench.results_file import ResultsFile, answer_record
from tita.bench.server_metrics import difference, parse_metrics, write_figures
from tita.errors import TitaError
from tita.storage.image_shards import pack_images

Write = Callable[..., Path]


def conditions(session: str, **load: Any) -> dict[str, Any]:
    return {
        "session": session, "started": "2026-11-29T02:00:00+00:00", "endpoint": "http://h:1/v1",
        "load": load, "options": {}, "client": {"tita": "1"},
        "machine": {"host": "here", "system": "Linux", "cpus": 2},
        "command": "tita-bench run --api-key ***",
    }  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a results file of one session: (sent at, response time, reply fields) per request."""

    def results(
        name: str, *requests: tuple[float, float], session: str = "s", start: int = 0,
        answer: str = "x", image: str = "", load: dict[str, Any] | None = None, **run: Any,
    ) -> Path:  # fmt: skip
        path = tmp_path / name
        fields = {"model_name": "m", "weight": None, "questions_sha256": "d"} | run
        known = conditions(session, **({"concurrency": 2} if load is None else load))
        with ResultsFile(path, run=fields, conditions=known) as file:
            for number, (sent_at, taken) in enumerate(requests, start=start):
                item = BenchmarkItem(
                    id=f"q{number}", text="What?", references=("x",), metric="exact",
                    images=(image,) if image else (),
                )  # fmt: skip
                reply = Reply(
                    text=answer, sent_at=sent_at, response_time_s=taken, first_token_s=0.1,
                    last_token_s=taken, input_tokens=100, output_tokens=11,
                    arrivals=[(0, 0.1)],
                )  # fmt: skip
                file.append(answer_record(item, reply, attempts=1, run=fields))
        return path

    return results


def test_throughput_concurrency_lengths_and_goodput(write: Write, tmp_path: Path) -> None:
    write("a.jsonl", (1000, 1.0), (1000, 2.0), (1001, 1.0), (1002, 2.0))
    report = evaluate(tmp_path, goodput=parse_goodput("ttft=200ms,e2el=1.5s")).report
    (load,) = report["runs"][0]["loads"]
    assert load["load"] == "concurrency 2"
    assert (load["requests"], load["failed"]) == (4, 0)
    assert load["duration_s"] == 4
    assert load["requests_per_s"] == 1
    assert load["input_tokens_per_s"] == 100
    assert load["output_tokens_per_s"] == 11
    assert load["concurrency"] == {"mean": 1.5, "peak": 2}
    assert (load["output_tokens"]["mean"], load["input_tokens"]["p99"]) == (11, 100)
    assert load["time_per_output_token"]["mean"] == pytest.approx((0.9 + 1.9) / 2 / 10)
    assert load["goodput"] == {
        "limits_s": {"ttft": 0.2, "e2el": 1.5}, "num_good": 2, "percent": 50,
        "requests_per_s": 0.5,
    }  # fmt: skip


def test_a_distribution_has_its_deviation_and_interval() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0, np.nan])
    found = distribution(values)
    assert found is not None
    assert (found["num"], found["mean"], found["p50"], found["max"]) == (4, 2.5, 2.5, 4)
    assert found["std"] == pytest.approx(1.2909944)
    assert found["high"] - found["mean"] == pytest.approx(1.96 * 1.2909944 / 2, rel=1e-4)
    assert distribution(np.array([np.nan])) is None


def test_the_time_between_two_sessions_does_not_count(write: Write, tmp_path: Path) -> None:
    write("a.jsonl", (1000, 1.0), session="s1")
    write("a.jsonl", (5000, 1.0), session="s2", start=1)
    (load,) = evaluate(tmp_path).report["runs"][0]["loads"]
    assert (load["duration_s"], load["requests_per_s"]) == (2, 1)


def test_times_of_different_loads_are_kept_apart(write: Write, tmp_path: Path) -> None:
    write("a.jsonl", (1000, 1.0), (1000, 1.0), session="s1")
    write("a.jsonl", (2000, 3.0), session="s2", start=2, load={"concurrency": 8})
    evaluation = evaluate(tmp_path)
    (run,) = evaluation.report["runs"]
    assert run["response_time"] is None, "a mean over both has no meaning"
    assert [load["response_time"]["mean"] for load in run["loads"]] == [1, 3]
    assert run["scores"][0]["num_scored"] == 3, "scores do not depend on the load"
    text = write_report(evaluation, folder=tmp_path, images=tmp_path)
    assert "concurrency 8" in text


def pair(a: Path, b: Path) -> tuple[BenchmarkRun, BenchmarkRun]:
    ((left, right),) = pair_runs(read_runs(a), read_runs(b))
    return left, right


def test_times_of_different_loads_are_not_compared_unless_told(write: Write) -> None:
    a = write("a.jsonl", (1000, 1.0), (1000, 1.0))
    b = write("b.jsonl", (1000, 2.0), (1000, 2.0), load={"concurrency": 8})
    refused = compare(*pair(a, b))
    assert refused.summary["response_time"] is None
    assert refused.summary["overall"]["mean"] == 0, "scores are compared"
    note = "Times of different loads are not compared: A was measured at concurrency 2, B at"
    assert note in comparison_text(refused)
    failures = check_gates(refused.summary, fail_below=None, fail_slower=3)
    assert "different loads" in failures[0]
    told = compare(*pair(a, b), any_load=True)
    assert told.summary["response_time"]["ratio"] == 2
    assert "Times of different loads are compared" in comparison_text(told)
    same = compare(*pair(a, write("c.jsonl", (1000, 2.0), (1000, 2.0))))
    assert same.summary["response_time"]["ratio"] == 2
    assert "different loads" not in comparison_text(same)


def test_a_gate_on_times_of_different_loads_is_refused(
    write: Write, tita_bench: Callable[..., Any]
) -> None:
    a = write("a.jsonl", (1000, 1.0))
    b = write("b.jsonl", (1000, 1.0), load={"concurrency": 2, "rate": 3.0})
    done = tita_bench("compare", a, b, "--fail-slower", "2")
    assert done.returncode == 2
    assert "B at 3 requests/s, constant, concurrency 2; measure both under one load" in done.stderr
    assert tita_bench("compare", a, b, "--fail-slower", "2", "--different-loads").returncode == 0


def test_an_older_file_without_conditions_is_compared(write: Write, tmp_path: Path) -> None:
    a = write("a.jsonl", (1000, 1.0))
    b = write("b.jsonl", (1000, 2.0), load={"concurrency": 8})
    lines = [json.loads(line) for line in a.read_text().splitlines()]
    drop = ("conditions", "session", "sent_at", "outcome")
    old = [{k: v for k, v in line.items() if k not in drop} for line in lines]
    a.write_text("".join(json.dumps(line) + "\n" for line in old))
    assert compare(*pair(a, b)).summary["response_time"]["ratio"] == 2
    (load,) = evaluate(tmp_path).report["runs"][0]["loads"]
    assert (load["load"], load["requests_per_s"], load["conditions"]) == ("", None, {})
    assert load["response_time"]["mean"] == 1


def test_titles_tell_runs_of_one_model_apart(write: Write, tmp_path: Path) -> None:
    for number in (1, 4):
        write(f"r_c{number}.jsonl", (1000, 1.0), load={"concurrency": number})
    titles = [run["title"] for run in evaluate(tmp_path).report["runs"]]
    assert titles == ["m (concurrency 1)", "m (concurrency 4)"]
    write("again.jsonl", (1000, 1.0), load={"concurrency": 4})
    titles = [run["title"] for run in evaluate(tmp_path).report["runs"]]
    assert titles == ["m (again.jsonl)", "m (r_c1.jsonl)", "m (r_c4.jsonl)"]


def test_a_sweep_has_its_knee(write: Write, tmp_path: Path) -> None:
    assert knee([(1.0, 1.0), (1.9, 1.1), (2.0, 4.0)]) == 1
    for number, taken in ((1, 1.0), (2, 1.1), (8, 6.0)):
        write(f"r_c{number}.jsonl", *[(1000, taken)] * number, load={"concurrency": number})
    evaluation = evaluate(tmp_path)
    text = write_report(evaluation, folder=tmp_path, images=tmp_path)
    assert "(knee) is at concurrency 2." in text
    assert "throughput against latency" in (tmp_path / "report.html").read_text()


def test_runs_with_other_options_are_no_points_of_a_sweep(write: Write, tmp_path: Path) -> None:
    for number, taken in ((1, 1.0), (2, 1.1)):
        write(f"r_c{number}.jsonl", *[(1000, taken)] * number, load={"concurrency": number})
    write("z.jsonl", (1000, 9.0), load={"concurrency": 2}, request={"omit": ["temperature"]})
    (points,) = sweeps(evaluate(tmp_path).report).values()
    assert [point["response_time"]["mean"] for point in points] == [1.0, 1.1]


def test_the_first_table_has_the_figures_that_are_asked_for_first(
    write: Write, tmp_path: Path
) -> None:
    write("a.jsonl", (1000, 1.0), (1000, 2.0))
    text = write_report(evaluate(tmp_path), folder=tmp_path, images=tmp_path)
    lines = text.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("run "))
    head, row = lines[at], lines[at + 1]
    for name, value in (("mean ms", "1500.000"), ("TTFT p95", "100.000"), ("requests/s", "1.000")):
        start = head.index(name)
        assert row[start : start + len(value)].split() == [value], name


def test_errors_come_first_and_wrong_answers_have_their_command(
    write: Write, tmp_path: Path
) -> None:
    path = write("a.jsonl", (1000, 1.0), (1000, 1.0), answer="wrong one", image="gone.jpg")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1] |= {
        "success": False, "outcome": "error", "response": "",
        "error_message": "HTTP 500: no\x1bquota",
        "response_time": None,
    }  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = write_report(evaluate(tmp_path), folder=tmp_path, images=tmp_path / "elsewhere")
    assert text.index("HTTP 500: no quota") < text.index("Load")
    html = (tmp_path / "report.html").read_text()
    assert (
        html.index("HTTP 500: no quota") < html.index("<h2>Runs</h2>") < html.index("Wrong answers")
    )
    assert "Endpoint http://h:1/v1; command: tita-bench run --api-key ***" in html
    assert "wrong one" in html
    assert f"1 image not found or not readable in {tmp_path / 'elsewhere'}, such as gone" in html


def test_figures_csv_has_every_figure(write: Write, tmp_path: Path) -> None:
    write("a.jsonl", (1000, 1.0), (1000, 2.0))
    write_report(evaluate(tmp_path), folder=tmp_path, images=tmp_path)
    rows = list(csv.DictReader((tmp_path / "figures.csv").open()))
    found = {(row["figure"], row["statistic"]): row["value"] for row in rows}
    assert float(found["response_time", "mean"]) == 1.5
    assert float(found["requests_per_s", "requests_per_s"]) == 1
    assert float(found["concurrency", "peak"]) == 2
    assert float(found["questions, exact", "score"]) == 100
    assert {row["load"] for row in rows} == {"", "concurrency 2"}


def test_a_comparison_says_which_images_it_cannot_find(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write("a.jsonl", (1000, 1.0), image="gone.jpg")
    b = write("b.jsonl", (1000, 1.0), image="gone.jpg", answer="y")
    html = comparison_page([compare(*pair(a, b))], images=tmp_path).html()
    assert "1 image not found" in html
    assert "1 image not found" in capsys.readouterr().err


def test_the_gallery_has_images_of_shards_and_none_that_cannot_be_decoded(
    write: Write, tmp_path: Path
) -> None:
    """The endpoint answered, whatever Pillow makes of the file."""
    packed = tmp_path / "packed"
    packed.mkdir()
    PIL.Image.new("RGB", (900, 30), "red").save(packed / "a.png")
    pack_images(packed, ["a.png"], into=tmp_path, shard_bytes=1 << 20)
    (tmp_path / "b.jpg").write_bytes(b"<svg></svg>")
    folder = ImageFolder(tmp_path)
    image = folder.first_of({"image": "a.png"})
    assert image is not None
    assert (image.mode, image.width) == ("RGB", 640)
    assert folder.first_of({"images": ["b.jpg"]}) is None
    assert folder.first_of({}) is None
    assert "1 image not found or not readable in" in folder.complaint()


@pytest.mark.parametrize("text", ["ttft", "ttft=5", "speed=5ms", "ttft=5ms,,"])
def test_goodput_limits_have_a_name_and_a_unit(text: str) -> None:
    with pytest.raises(TitaError, match="is not a limit"):
        parse_goodput(text)


BEFORE = """# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{le="+Inf",model_name="m"} 2
vllm:time_to_first_token_seconds_sum{model_name="m"} 1.0
vllm:time_to_first_token_seconds_count{model_name="m"} 2
# TYPE vllm:prompt_tokens counter
vllm:prompt_tokens_total{model_name="m"} 10
vllm:prompt_tokens_total{model_name="n"} 5
python_info{version="3"} 1
"""
AFTER = BEFORE.replace("} 1.0", "} 4.0").replace("} 2\n", "} 5\n").replace("} 10", "} 70")


def test_only_the_base_models_prefix_cache_counts() -> None:
    name, labels = "tita:prefix_cache_queries_total", 'model_name="tita",role='
    text = f"# TYPE {name.removesuffix('_total')} counter\n" + "".join(
        f'{name}{{{labels}"{role}"}} {value}\n' for role, value in (("base", 3), ("reward", 3))
    )
    assert parse_metrics(text) == {"prefix_cache_queries_total": 3}


def test_the_servers_figures_are_differences(write: Write, tmp_path: Path) -> None:
    before, after = parse_metrics(BEFORE), parse_metrics(AFTER)
    assert before is not None
    assert after is not None
    figures = difference(before, after)
    assert figures == {"time_to_first_token": {"num": 3, "mean": 1.0}, "prompt_tokens": 60}
    assert difference(after, before) is None, "the server was restarted"
    assert difference(before, {**after, "prompt_tokens_total": float("nan")}) is None
    assert parse_metrics("up 1\n") is None
    path = write("a.jsonl", (1000, 1.0))
    write_figures(path, session="s", figures=figures)
    text = write_report(evaluate(tmp_path), folder=tmp_path, images=tmp_path)
    lines = text.splitlines()
    at = lines.index("The server's own times, mean ms")
    assert lines[at + 1].split() == ["run", "TTFT", "TTFT,", "client"]
    assert lines[at + 2].split()[-2:] == ["1000.000", "100.000"]
    at = lines.index("The server's own counts")
    assert lines[at + 2].split()[-2:] == ["60", "100"]
