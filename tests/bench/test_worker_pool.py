"""The endpoint client and worker pool over HTTP: slow, failing, invalid and hanging answers."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from pydantic import SecretStr

from tests.bench.conftest import FIRST_FIELDS
from tita.bench import worker_pool
from tita.bench.chat_response import Reply, add_usage, parse_retry_after, server_message
from tita.bench.endpoint import EndpointUnavailable
from tita.bench.evaluate import evaluate
from tita.bench.load_shape import ClientOptions
from tita.bench.methods import Method
from tita.bench.outcomes import ErrorMessages
from tita.bench.registry import ModelEndpoint, RegisteredModel, TokenPrice
from tita.bench.request_body import GenerationOptions
from tita.bench.results_file import read_results
from tita.bench.tasks import BenchmarkTask, run_endpoint
from tita.bench.worker_pool import RequestStats
from tita.errors import TitaError

Ask = Callable[..., tuple[RequestStats, dict[str, dict[str, Any]]]]


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "_FIRST_BACKOFF_S", 0.01)


@pytest.fixture
def ask(endpoint: Any, tmp_path: Path) -> Ask:
    def run(questions: Path, *, generation: Any = None, **options: Any) -> Any:
        out = tmp_path / "results.jsonl"
        model = options.pop("model", RegisteredModel(id="vendor/model"))
        base_url = options.pop("base_url", endpoint.base_url)
        key = options.pop("key", None)
        client = ClientOptions(**{"timeout_s": 60, "retries": 3} | options)
        task = BenchmarkTask(
            questions=questions,
            images=tmp_path,
            out=out,
            generation=GenerationOptions(**{"max_new_tokens": 9} | (generation or {})),
        )
        target = ModelEndpoint(name="short", model=model, base_url=base_url, key=key)
        stats = run_endpoint(task, target, options=client)
        return stats, {record["question_id"]: record for record in read_results(out)}

    return run


def test_a_line_has_the_ten_fields_times_and_scores(ask: Ask, ask_file: Any, endpoint: Any) -> None:
    path = ask_file("say:Yes, there is;script:slow", references=["yes"], metric="yes-no")
    price = TokenPrice(input=2, output=4, currency="EUR")
    stats, results = ask(path, model=RegisteredModel(id="vendor/model", price=price))
    line = results["q0"]
    assert tuple(line)[:10] == FIRST_FIELDS
    assert (stats.num_asked, stats.num_failed) == (1, 0)
    assert line["model_name"] == "short"
    assert line["response"] == "Yes, there is"
    assert (line["input_tokens"], line["output_tokens"], line["total_tokens"]) == (10, 3, 13)
    assert line["success"] is True
    assert line["error_message"] is None
    assert 0.5 <= line["time_to_first_token"] < line["time_to_last_token"]
    assert line["time_to_last_token"] <= line["response_time"]
    assert line["time_per_output_token"] == pytest.approx(
        (line["time_to_last_token"] - line["time_to_first_token"]) / 2, abs=1e-5
    )
    assert line["scores"] == {"yes-no": 1.0}
    assert line["parsed"] == "yes"
    assert line["usage"] == {"changed_tokens": 1}
    assert line["price"] == {"input": 2.0, "output": 4.0, "currency": "EUR"}
    (asked,) = endpoint.asked()
    assert asked["model"] == "vendor/model"
    assert asked["max_tokens"] == 9
    assert "guidance_weight" not in asked
    assert asked["key"] is None


def test_unicode_line_separators_are_text(ask: Ask, ask_file: Any) -> None:
    said = "one\u2028two\x85three 四"
    _, results = ask(ask_file(f"say:{said};"))
    assert results["q0"]["response"] == said
    assert results["q0"]["attempts"] == 1


def test_a_stream_without_its_last_blank_line_is_complete(ask: Ask, ask_file: Any) -> None:
    _, results = ask(ask_file("script:unterminated"))
    assert results["q0"]["response"] == "é"
    assert results["q0"]["attempts"] == 1


@pytest.mark.parametrize(
    ("script", "attempts"),
    [
        ("ok", 1),
        ("whole", 1),
        ("old", 1),
        ("500,ok", 2),
        ("502,500,drop,ok", 4),
        ("broken,ok", 2),
        ("cut,ok", 2),
        ("badjson,ok", 2),
        ("html,ok", 2),
        ("badgzip,ok", 2),
        ("nested,digits,ok", 3),
        ("nochoices,ok", 2),
        ("errorevent,ok", 2),
        ("hang,ok", 2),
        ("drop,ok", 2),
    ],
)
def test_transient_failures_are_retried(
    ask: Ask, ask_file: Any, script: str, attempts: int
) -> None:
    # A busy machine may take as long for an answer as this test may wait for none.
    hangs = {"timeout_s": 1.0} if "hang" in script else {}
    stats, results = ask(ask_file(f"say:yes;script:{script}"), **hangs)
    assert results["q0"]["success"], results["q0"]["error_message"]
    assert results["q0"]["response"] == "yes", "no part of an interrupted stream is kept"
    assert results["q0"]["attempts"] == attempts
    assert (stats.num_failed, stats.num_retries) == (0, attempts - 1)


@pytest.mark.parametrize(
    ("script", "attempts", "error"),
    [
        ("400", 1, "HTTP 400: no, not with None"),
        ("500", 4, "HTTP 500"),
        ("503", 1, "Retry-After: 3600 s"),
        ("broken", 4, "connection failed (peer closed"),
        ("cut", 4, "the stream ended before the answer was complete"),
        ("badjson", 4, "not JSON"),
        ("nochoices", 4, "not a chat completion"),
        ("nochoiceevents", 4, "not a chat completion: no choices"),
        ("halferror", 4, "error in the choice: half \ufffd"),
        ("owncode", 4, 'not a chat completion: no choices ({"code": 500, "msg": "no quota"})'),
        ("ownevent", 4, "not a chat completion: no choices (no quota)"),
        ("plainerror", 4, "no quota"),
        ("errorevent", 4, "overloaded"),
        ("badgzip", 4, "not readable (Error -3"),
        ("hang", 4, "no answer within 0.5 s"),
        ("drop", 4, "connection failed"),
    ],
)
def test_permanent_failures_are_recorded(
    ask: Ask, ask_file: Any, script: str, attempts: int, error: str
) -> None:
    hangs = {"timeout_s": 0.5} if script == "hang" else {}
    stats, results = ask(ask_file(f"script:{script}", "fine"), **hangs)
    assert (stats.num_asked, stats.num_failed) == (2, 1)
    failed = results["q0"]
    assert failed["success"] is False
    assert failed["response"] == ""
    assert failed["response_time"] is None
    assert error in failed["error_message"]
    assert failed["attempts"] == attempts
    assert results["q1"]["success"] is True


def test_a_retried_error_is_said_once_with_the_servers_words(
    ask: Ask, ask_file: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(ask_file("script:500,500,ok", "1 script:500,ok", "script:later,ok"))
    said = [line for line in capsys.readouterr().err.splitlines() if "retrying" in line]
    assert sorted(said) == [
        "HTTP 429: {}; retrying in 1 s (Retry-After)",
        "HTTP 500: no, not with None; retrying",
    ]


def test_messages_of_a_server_are_bounded_and_cannot_control_a_terminal() -> None:
    messages = ErrorMessages()
    assert messages.add("HTTP 400: \x1b[2Jrequest 1f\nfails") == "HTTP 400: [2Jrequest 1f fails"
    assert messages.add("HTTP 400: \x1b[2Jrequest 2e fails") is None, "only its id is another"
    messages.add("no answer")
    for letter in "abcdef":
        messages.add(f"HTTP 400: {letter * 999}")
    *shown, more = messages.lines()
    assert shown == ["HTTP 400: [2Jrequest 1f fails", *(f"HTTP 400: {x * 290}" for x in "abc")]
    assert more == "further messages are in the results files"


def test_failed_questions_are_asked_again_and_have_one_line(
    ask: Ask, ask_file: Any, endpoint: Any
) -> None:
    path = ask_file("script:400,ok", "fine", "also fine")
    ask(path)
    stats, results = ask(path)
    assert (stats.num_asked, stats.num_failed, stats.num_kept) == (1, 0, 2)
    assert all(record["success"] for record in results.values())
    assert len(endpoint.asked()) == 4


def test_retry_after_delays_all_workers(ask: Ask, ask_file: Any, endpoint: Any) -> None:
    texts = ["script:429,ok", *(f"script:slow {n}" for n in range(8))]
    stats, results = ask(ask_file(*texts), concurrency=2)
    assert stats.num_failed == 0
    assert results["q0"]["attempts"] == 2
    times = [entry["at"] for entry in endpoint.asked()]
    assert min(times[2:]) - times[0] >= 0.95, "no request is sent before Retry-After has passed"


def test_retry_after_is_seconds_or_a_date() -> None:
    assert parse_retry_after("7") == 7
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert parse_retry_after("2.5") == 2.5
    for nonsense in (None, "", "soon", "-3", "nan", "inf"):
        assert parse_retry_after(nonsense) is None


def test_counts_that_are_none_are_not_reported() -> None:
    reply = Reply()
    add_usage(reply, {"prompt_tokens": 3.0, "completion_tokens": -1, "total_tokens": True})
    assert (reply.input_tokens, reply.output_tokens, reply.total_tokens) == (3, None, None)


def test_an_error_in_a_list_is_read() -> None:
    body = b'[{"error": {"code": 400, "message": "Invalid argument", "param": "seed"}}]'
    assert server_message(body) == ("Invalid argument", "seed")


def test_concurrency_limits_requests_in_flight(ask: Ask, ask_file: Any, endpoint: Any) -> None:
    ask(ask_file(*(f"{n} script:slow" for n in range(9))), concurrency=3)
    assert endpoint.most_open() == 3


def test_rate_limits_requests_per_second(ask: Ask, ask_file: Any, endpoint: Any) -> None:
    # A busy machine may delay the arrival of the first request.
    began = time.monotonic()
    ask(ask_file(*map(str, range(11))), rate=20)
    assert endpoint.asked()[-1]["at"] - began >= 10 / 20


def test_a_rejected_key_ends_the_run_and_is_not_printed(
    ask: Ask, ask_file: Any, tmp_path: Path
) -> None:
    with pytest.raises(TitaError, match="rejects the API key") as caught:
        ask(ask_file("script:401"), key=SecretStr("sk-very-secret"))
    assert "sk-very-secret" not in str(caught.value)
    assert "***" in str(caught.value)


def test_an_echoed_key_is_masked_in_the_results(
    ask: Ask, ask_file: Any, endpoint: Any, tmp_path: Path
) -> None:
    ask(ask_file("script:400", "fine"), key=SecretStr("sk-very-secret"))
    assert endpoint.asked()[0]["key"] == "Bearer sk-very-secret"
    text = (tmp_path / "results.jsonl").read_text()
    assert "sk-very-secret" not in text
    assert "not with Bearer ***" in text


def test_an_unreachable_endpoint_ends_the_run(ask: Ask, ask_file: Any) -> None:
    with pytest.raises(EndpointUnavailable, match="no connection") as caught:
        ask(
            ask_file(*map(str, range(50))),
            base_url="http://127.0.0.1:9/v1",
            concurrency=4,
            retries=1,
        )
    assert caught.value.exit_code == 75


def test_web_pages_in_the_place_of_answers_end_the_run(
    ask: Ask, ask_file: Any, endpoint: Any
) -> None:
    questions = ask_file(*(f"{number} script:html" for number in range(50)))
    wanted = "no chat completion for 8 questions in a row: not JSON: '<html>gateway</html>'; check"
    with pytest.raises(EndpointUnavailable, match=wanted):
        ask(questions, concurrency=4, retries=0)
    assert len(endpoint.asked()) < 50


def test_a_proxy_is_not_asked_for_this_machine(
    ask: Ask, ask_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    stats, results = ask(ask_file("one"), model=RegisteredModel(id="ours"))
    assert stats.num_failed == 0
    assert results["q0"]["reward"] == "runs/dpo-7/model", "also for the list of models"


def test_an_unknown_url_ends_the_run(ask: Ask, ask_file: Any) -> None:
    with pytest.raises(TitaError, match="does not know"):
        ask(ask_file("script:404"))


def test_a_redirect_ends_the_run_with_its_address(ask: Ask, ask_file: Any, endpoint: Any) -> None:
    wanted = r"HTTP 308: redirects to https://other.test/v1/chat/completions\); give it as"
    with pytest.raises(TitaError, match=wanted):
        ask(ask_file(*("script:moved" for _ in range(9))), concurrency=1)
    assert len(endpoint.asked()) == 1


@pytest.mark.parametrize(
    "script",
    [
        "parts",
        "partevents",
        "nulldelta",
        "mark",
        "untyped",
        "wholeevent",
        "wholepart",
        "twochoices",
    ],
)
def test_unusual_shapes_of_content_are_read(ask: Ask, ask_file: Any, script: str) -> None:
    _, results = ask(ask_file(f"script:{script}", references=["yes"], metric="exact"))
    line = results["q0"]
    assert (line["response"], line["success"], line["attempts"]) == ("yes", True, 1)
    assert (line["outcome"], line["scores"]) == ("answered", {"exact": 1.0})


def test_a_character_in_two_events_is_one(ask: Ask, ask_file: Any) -> None:
    _, results = ask(ask_file("script:halves", "script:halffinish"))
    assert results["q0"]["response"] == "\U0001f600"
    assert results["q1"]["finish_reason"] == "st\ufffdop"


@pytest.mark.parametrize(
    ("script", "outcome", "error"),
    [
        ("length", "length", "no answer before the token limit"),
        ("lengthevents", "length", "no answer before the token limit"),
        ("filter", "content_filter", "withheld by the content filter"),
        ("filterevents", "content_filter", "withheld by the content filter"),
        ("refusal", "refusal", "refused to answer: I cannot help with that."),
        ("refusalevents", "refusal", "refused to answer: I cannot"),
        ("finishrefusal", "refusal", "refused to answer"),
        ("tools", "tool_calls", "tool calls instead of an answer"),
    ],
)
def test_a_response_that_is_no_answer_is_no_success(
    ask: Ask, ask_file: Any, tmp_path: Path, script: str, outcome: str, error: str
) -> None:
    path = ask_file(f"script:{script}", "say:x;", references=["x"], metric="exact")
    stats, results = ask(path)
    line = results["q0"]
    assert (line["success"], line["outcome"], line["attempts"]) == (False, outcome, 1)
    assert line["error_message"].startswith(error)
    assert "scores" not in line
    assert (stats.num_failed, list(stats.errors.values())) == (1, [1])
    (run,) = evaluate(tmp_path).report["runs"]
    assert (run["num_answered"], run["success_rate"]) == (1, 0.5)
    assert run["outcomes"] == {outcome: 1, "answered": 1}
    assert run["errors"] == {error.partition(":")[0]: 1}


@pytest.mark.parametrize("script", ["finisherror", "choiceerror", "choiceerrorevents"])
def test_an_error_in_the_place_of_an_answer_is_retried(
    ask: Ask, ask_file: Any, script: str
) -> None:
    stats, results = ask(ask_file(f"script:{script},ok", f"script:{script}"))
    assert (results["q0"]["response"], results["q0"]["attempts"]) == ("yes", 2)
    assert (results["q1"]["success"], results["q1"]["outcome"]) == (False, "error")
    assert stats.num_failed == 1


@pytest.mark.parametrize("script", ["empty", "null"])
def test_an_empty_answer_is_counted_and_wrong(
    ask: Ask, ask_file: Any, tmp_path: Path, script: str
) -> None:
    stats, results = ask(ask_file(f"script:{script}", references=["x"], metric="exact"))
    assert (stats.num_failed, stats.num_empty) == (0, 1)
    assert (results["q0"]["outcome"], results["q0"]["scores"]) == ("empty", {"exact": 0.0})
    (run,) = evaluate(tmp_path).report["runs"]
    assert run["outcomes"] == {"empty": 1}


def test_a_fraction_of_a_second_of_retry_after_is_waited(
    ask: Ask, ask_file: Any, endpoint: Any
) -> None:
    ask(ask_file("script:later,ok"))
    first, second = (entry["at"] for entry in endpoint.asked())
    assert second - first >= 0.6


def test_a_refused_field_is_named_with_the_option_that_changes_it(
    ask: Ask, ask_file: Any, endpoint: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        TitaError, match=r"refuses 'max_tokens' .*--rename max_tokens=max_completion_tokens"
    ):
        ask(ask_file(*("script:refuse=max_tokens" for _ in range(50))), concurrency=2)
    assert len(endpoint.asked()) <= 2, "the run ends, because every question would fail"
    questions = ("fine", *(f"{n} script:refuse=temperature" for n in range(3)))
    stats, _ = ask(ask_file(*questions), concurrency=1)
    assert stats.num_failed == 3
    assert capsys.readouterr().err.count("refuses 'temperature'") == 1


def test_an_error_that_mentions_a_field_is_not_its_refusal(
    ask: Ask, ask_file: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    stats, _ = ask(ask_file("script:toolong", "fine"), concurrency=1)
    assert stats.num_failed == 1
    assert "refuses" not in capsys.readouterr().err


def test_the_type_of_an_image_is_that_of_its_bytes(
    ask: Ask, ask_file: Any, endpoint: Any, tmp_path: Path
) -> None:
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg", "png")
    ask(ask_file("look", image="a.jpg"))
    assert endpoint.asked()[0]["images"][0].startswith("data:image/png;base64,iVBOR")


def test_images_are_sent_as_data_urls_and_the_weight_as_a_field(
    ask: Ask, ask_file: Any, endpoint: Any, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    ask(ask_file("look", image="a.png"), generation={"weight": 0.3})
    (asked,) = endpoint.asked()
    assert asked["images"] == ["data:image/png;base64,iVBORw=="]
    assert asked["guidance_weight"] == 0.3


@pytest.mark.parametrize(
    ("options", "generation", "times"),
    [
        ((), {"weight": 0.3}, 1),
        ((), {"weights": {"brief": 0.3, "kind": 0.0}}, 1),
        ((), {"method": Method(name="vcd", form="vcd", weight=1.0)}, 1),
        ((), {"weight": 0.0}, 0),
        ((), {}, 0),
        (("--models",), {"weight": 0.3}, 0),
    ],
)
def test_guidance_that_an_endpoint_may_ignore_is_said_once(
    options: tuple[str, ...], generation: dict[str, Any], times: int,
    ask: Ask, ask_file: Any, start_endpoint: Any, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Only `tita serve` sends the digest of its models."""
    base_url = start_endpoint(*options).base_url
    stats, _ = ask(ask_file("a", "b", "c"), base_url=base_url, generation=generation)
    assert (stats.num_asked, stats.num_failed) == (3, 0)
    assert capsys.readouterr().err.count("; the endpoint may ignore guidance_weight") == times


def test_results_name_the_checkpoints_that_the_endpoint_lists(
    ask: Ask, ask_file: Any, endpoint: Any, tmp_path: Path
) -> None:
    questions = ask_file("one", "script:400,ok", "three", "four")
    before = endpoint.times_listed()
    _, results = ask(questions, model=RegisteredModel(id="ours"))
    assert endpoint.times_listed() == before + 1
    assert results["q0"]["reward_sha256"] == "feed"
    assert results["q0"]["reward"] == "runs/dpo-7/model"
    assert (results["q0"]["base"], results["q0"]["base_sha256"]) == ("hub/b", "cafe")
    assert results["q0"]["run"] == "dpo-7"
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text().replace('"feed"', '"other"'))
    with pytest.raises(
        TitaError, match="the file has answers with reward_sha256 'other', not 'feed'"
    ):
        ask(questions, model=RegisteredModel(id="ours"))


def test_a_missing_image_is_reported_before_the_first_request(
    ask: Ask, ask_file: Any, endpoint: Any
) -> None:
    with pytest.raises(TitaError, match=r"no image gone\.jpg"):
        ask(ask_file("fine", "look", image="gone.jpg"))
    assert endpoint.asked() == []


def test_every_suite_of_a_file_has_its_own_number_of_questions(ask: Ask, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    rows = [{"id": n, "text": f"{n}?", "suite": "ab"[n == 2]} for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ask(path)
    runs = evaluate(tmp_path).report["runs"]
    assert [(run["suite"], run["num_questions"], run["num_not_asked"]) for run in runs] == [
        ("a", 2, 0), ("b", 1, 0),
    ]  # fmt: skip
    assert [run["success_rate"] for run in runs] == [1, 1]


def test_answers_are_written_while_other_requests_are_in_flight(
    ask_file: Any, endpoint: Any, tmp_path: Path
) -> None:
    path = ask_file("quick", "script:hang")
    out = tmp_path / "results.jsonl"
    task = BenchmarkTask(questions=path, images=tmp_path, out=out)
    target = ModelEndpoint(name="m", model=RegisteredModel(id="m"), base_url=endpoint.base_url)

    async def watch() -> list[str]:
        run = asyncio.to_thread(run_endpoint, task, target, options=ClientOptions())
        running = asyncio.create_task(run)
        while not (out.exists() and out.read_text().endswith("\n")):
            assert not running.done()
            await asyncio.sleep(0.01)
        lines = out.read_text().splitlines()
        endpoint.release()
        await running
        return lines

    (line,) = asyncio.run(watch())
    assert json.loads(line)["question_id"] == "q0"
    assert [record["success"] for record in read_results(out)] == [True, True]
