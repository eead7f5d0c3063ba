"""The results file: repair, locking, one line per question after kills."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tita.bench.chat_response import Reply
from tita.bench.endpoint import model_links
from tita.bench.evaluate import read_runs
from tita.bench.questions import BenchmarkItem
from tita.bench.results_file import ResultsFile, answer_record, find_results_files, read_results
from tita.errors import TitaError

RUN = {"model_name": "m", "weight": None, "questions_sha256": "abc"}


def line(number: int, *, success: bool = True, **more: Any) -> str:
    reply = Reply(text="yes", response_time_s=0.1) if success else None
    record = answer_record(BenchmarkItem(id=f"q{number}", text="t"), reply, attempts=1, run=RUN)
    return json.dumps({**record, **more}) + "\n"


@pytest.mark.parametrize(
    ("field", "fault"),
    [
        ({"success": "false"}, "'success' is not true or false"),
        ({"references": "yes"}, "'references' is not a list"),
        ({"references": [5]}, "'references' has a value that is not a text"),
        ({"choices": [{"A": "cat"}]}, "'choices' has a value that is not a text"),
        ({"response": ["yes"]}, "'response' is not a text"),
        ({"response": "half \ud83d"}, "half a character"),
        ({"weight": "0.3"}, "'weight' is not a number"),
        ({"usage": 5}, "'usage' is not an object"),
        ({"conditions": [1]}, "'conditions' is not an object"),
        ({"thinking": "loud"}, "unknown 'thinking' 'loud'"),
        ({"price": {"input": 1}}, "'price' has no input, output or currency"),
    ],
)
def test_a_value_of_another_type_is_refused_with_its_line(
    tmp_path: Path, field: dict[str, Any], fault: str
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(line(0) + json.dumps(json.loads(line(1)) | field) + "\n")
    with pytest.raises(TitaError, match=fault) as refused:
        read_runs(path)
    assert refused.value.where == f"{path}:2"
    with pytest.raises(TitaError, match=fault):
        list(read_results(path))


def test_an_answer_that_is_null_is_empty_and_damaged_lines_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.jsonl"
    none: dict[str, Any] = {"references": ["none"], "metric": "exact", "outcome": None}
    damaged = '{"question_id": "q8", "mod\n{"another": "tool"}\n'
    first = line(0, response=None, input_tokens=10**400, **none)
    path.write_text(first + damaged + line(1, **none) + line(2)[:40])
    (run,) = read_runs(path)
    assert (list(run.rows), [*run.column("score")]) == (["q0", "q1"], [0.0, 0.0])
    said = f"{path}: left out 2 lines, damaged or with no result\n"
    assert capsys.readouterr().err == said, "the last line may still be written"


def test_a_truncated_last_line_is_removed_and_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(line(0) + line(1) + line(2)[:40])
    with ResultsFile(path, run=RUN) as results:
        assert results.done == {"q0", "q1"}
        results.append(json.loads(line(2)))
    assert [record["question_id"] for record in read_results(path)] == ["q0", "q1", "q2"]
    assert path.read_bytes().count(b"\n") == 3


def test_answers_to_images_that_have_changed_are_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    pictures = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for picture in pictures:
        picture.write_text(picture.name)
    images = {"q0": pictures[:1], "q1": pictures[1:], "q2": []}
    with ResultsFile(path, run=RUN, images=images) as results:
        for number in range(3):
            results.append(json.loads(line(number)))
    has_digest = ["images_sha256" in record for record in read_results(path)]
    assert has_digest == [True, True, False]
    pictures[0].touch()
    with ResultsFile(path, run=RUN, images=images) as results:
        assert results.done == {"q0", "q1", "q2"}
    pictures[2].write_text("another")
    with ResultsFile(path, run=RUN, images=images) as results:
        assert results.done == {"q0", "q2"}
        results.append(json.loads(line(1)))
    pictures[0].unlink()  # an answer to an image that is gone is kept
    with ResultsFile(path, run=RUN, images=images) as results:
        assert results.done == {"q0", "q1", "q2"}


def test_a_last_line_without_a_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(line(0) + line(1).rstrip())
    with ResultsFile(path, run=RUN) as results:
        assert results.done == {"q0", "q1"}
        results.append(json.loads(line(2)))
    assert len(list(read_results(path))) == len(path.read_text().splitlines()) == 3


def test_failed_and_repeated_lines_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(line(0) + line(1, success=False) + "\0\0\0\n" + line(0) + line(2))
    with ResultsFile(path, run=RUN) as results:
        assert results.done == {"q0", "q2"}
    assert path.read_text() == line(0) + line(2)


def test_a_valid_file_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(line(0))
    before = path.stat()
    with ResultsFile(path, run=RUN):
        pass
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize(
    "content",
    [
        *('{"question_id": 1, "text": "a question"}\n', "some notes\nof mine\n", line(0) + "{}\n"),
        *("a note\n", "a note without end"),
    ],
)
def test_a_file_of_another_format_is_not_changed(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(TitaError, match="not a valid results file"), ResultsFile(path, run=RUN):
        pass
    assert path.read_text() == content


@pytest.mark.parametrize("torn", [False, True])
def test_a_second_writer_is_rejected(tmp_path: Path, torn: bool) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(line(0) + ("{" if torn else ""))
    with (
        ResultsFile(path, run=RUN),
        pytest.raises(TitaError, match="another process is writing"),
        ResultsFile(path, run=RUN),
    ):
        pass
    with ResultsFile(path, run=RUN):
        pass


def test_answers_of_another_protocol_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(line(0))
    for other in ({"model_name": "n"}, {"weight": 0.3}, {"questions_sha256": "def"}):
        with (
            pytest.raises(TitaError, match="choose another --out"),
            ResultsFile(path, run=RUN | other),
        ):
            pass
    assert path.read_text() == line(0)


@pytest.mark.parametrize(
    ("key", "value", "other"),
    [
        ("weights", {"faithful": 0.3, "brief": 0.1}, {"faithful": 0.9, "brief": 0.1}),
        ("ignore_columns", ["system"], None),
    ],
)
def test_answers_with_other_options_are_rejected(
    tmp_path: Path, key: str, value: Any, other: Any
) -> None:
    path = tmp_path / "r.jsonl"
    run = RUN | {key: value}
    with ResultsFile(path, run=run, conditions={"session": "s"}) as results:
        results.append(json.loads(line(0)) | run)
    with (
        pytest.raises(TitaError, match=rf"other options \({key}\)"),
        ResultsFile(path, run=RUN | ({key: other} if other else {})),
    ):
        pass


def test_weights_by_name_are_in_the_title(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    weights = {"faithful": 0.3, "brief": 0.1}
    path.write_text(line(0, weights=weights) + line(1, weights=weights | {"brief": 0.2}))
    titles = [run.title for run in read_runs(path)]
    assert titles == ["m brief=0.1+faithful=0.3", "m brief=0.2+faithful=0.3"]


def test_older_files_with_ten_fields_are_resumed(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    old = dict(list(json.loads(line(0)).items())[:10])
    path.write_text(json.dumps(old) + "\n")
    for run in (RUN, RUN | {"model_name": "short", "model_id": "m"}):
        with ResultsFile(path, run=run) as results:
            assert results.done == {"q0"}


def test_results_files_are_recognised_by_their_content(tmp_path: Path) -> None:
    (tmp_path / "whatever its name.jsonl").write_text("{torn\n" + line(0))
    (tmp_path / "questions.jsonl").write_text('{"question_id": 1, "text": "t"}\n')
    (tmp_path / ".hidden.jsonl").write_text(line(0))
    (tmp_path / "empty.jsonl").write_text("")
    assert [path.name for path in find_results_files(tmp_path)] == ["whatever its name.jsonl"]
    with pytest.raises(TitaError, match="no such folder"):
        find_results_files(tmp_path / "gone")


def command_for(endpoint: Any, questions: Path, out: Path) -> list[str]:
    return [
        sys.executable, "-c", "from tita.cli.main import tita_bench; tita_bench()", "run",
        "--model", "m", "--base-url", endpoint.base_url, "--questions", str(questions),
        "--out", str(out), "--concurrency", "4",
    ]  # fmt: skip


def kill_and_resume(
    endpoint: Any, questions: Path, out: Path, *, num_kills: int, num_questions: int
) -> int:
    """Kill and restart, then let it finish; returns how many kills hit a running process."""
    command = command_for(endpoint, questions, out)
    draw, num_hits = random.Random(num_kills), 0
    for number in range(num_kills):
        how = signal.SIGTERM if number % 3 == 2 else signal.SIGKILL
        seen = len(list(read_results(out))) if out.exists() else 0
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        # Kills hit the run itself, not the start of the interpreter.
        wanted = seen + draw.randint(1, max(1, num_questions // (num_kills + 2)))
        while process.poll() is None and (
            not out.exists() or out.read_bytes().count(b"\n") < wanted
        ):
            time.sleep(0.01)
        time.sleep(draw.random() * 0.05)
        num_hits += process.poll() is None
        process.send_signal(how)
        code = process.wait(timeout=30)
        assert code in (-signal.SIGKILL, 0) or (how is signal.SIGTERM and code in (75, -15)), code
    assert subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
    return num_hits


def check_one_line_per_question(out: Path, *, num_questions: int) -> None:
    lines = out.read_text().splitlines()
    identities = [json.loads(text)["question_id"] for text in lines]
    assert sorted(identities) == sorted(f"q{n}" for n in range(num_questions))


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_an_interrupted_run_prints_how_to_resume(
    start_endpoint: Callable[..., Any],
    ask_file: Any,
    tmp_path: Path,
    how: signal.Signals,
    code: int,
) -> None:
    questions, out = ask_file(*(f"question {n}" for n in range(200))), tmp_path / "r.jsonl"
    process = subprocess.Popen(
        command_for(start_endpoint(delay=0.1), questions, out), stderr=subprocess.PIPE, text=True
    )
    while not out.exists() or not out.read_bytes():
        time.sleep(0.02)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code, stderr
    num = len(list(read_results(out)))
    assert 0 < num < 200
    assert f"{num} questions are answered in {out}; run the command again to resume" in stderr


def test_an_interrupted_run_says_what_failed(endpoint: Any, ask_file: Any, tmp_path: Path) -> None:
    questions, out = ask_file("script:400", "script:hang"), tmp_path / "r.jsonl"
    process = subprocess.Popen(
        command_for(endpoint, questions, out), stderr=subprocess.PIPE, text=True
    )
    while not out.exists() or not out.read_bytes():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert stderr.splitlines()[-3:] == [
        f"0 questions are answered in {out}; run the command again to resume",
        "1 failed: 1 × HTTP 400; run the same command again to retry them",
        "  HTTP 400: no, not with None",
    ]


@pytest.mark.slow
def test_three_kills_leave_one_line_per_question(
    start_endpoint: Callable[..., Any], ask_file: Any, tmp_path: Path
) -> None:
    questions, out = ask_file(*(f"question {n}" for n in range(120))), tmp_path / "r.jsonl"
    endpoint = start_endpoint(delay=0.05)
    num_hits = kill_and_resume(endpoint, questions, out, num_kills=3, num_questions=120)
    assert num_hits == 3, "every kill hit a running process"
    check_one_line_per_question(out, num_questions=120)


@pytest.mark.soak
def test_twenty_kills_leave_one_line_per_question(
    start_endpoint: Callable[..., Any], ask_file: Any, tmp_path: Path
) -> None:
    questions, out = ask_file(*(f"question {n}" for n in range(800))), tmp_path / "r.jsonl"
    endpoint = start_endpoint(delay=0.05)
    num_hits = kill_and_resume(endpoint, questions, out, num_kills=20, num_questions=800)
    assert num_hits == 20, "every kill hit a running process"
    check_one_line_per_question(out, num_questions=800)


def test_another_root_under_the_same_name_is_another_model(
    start_endpoint: Callable[..., Any], tmp_path: Path
) -> None:
    """vLLM lists it, and no digest."""
    links = model_links(start_endpoint().base_url, model_id="v", key=None)
    assert links == {"model_root": "/models/v"}
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(json.loads(line(0)) | {"model_root": "/models/u"}) + "\n")
    fault = "answers with model_root '/models/u', not '/models/v'; choose another --out"
    with pytest.raises(TitaError, match=fault), ResultsFile(path, run=RUN | links):
        pass
