"""Reasoning models: the clock, what is scored, and fields that endpoints do not take."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bench.conftest import Scripted
from tita.bench.conditions import masked_command
from tita.bench.evaluate import evaluate
from tita.bench.load_shape import ClientOptions
from tita.bench.reasoning import Thinking, separate
from tita.bench.registry import ModelEndpoint, RegisteredModel
from tita.bench.request_body import FieldOverrides, GenerationOptions
from tita.bench.results_file import read_results
from tita.bench.tasks import BenchmarkTask, run_endpoint
from tita.errors import TitaError

Bench = Callable[..., Any]


@pytest.fixture
def ask(endpoint: Scripted, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Ask one question; returns its line."""

    def run(questions: Path, **generation: Any) -> dict[str, Any]:
        out = tmp_path / "results.jsonl"
        task = BenchmarkTask(
            questions=questions,
            images=tmp_path,
            out=out,
            generation=GenerationOptions(**generation),
        )
        target = ModelEndpoint(name="m", model=RegisteredModel(id="m"), base_url=endpoint.base_url)
        run_endpoint(task, target, options=ClientOptions(timeout_s=5))
        (line,) = read_results(out)
        return line

    return run


@pytest.mark.parametrize("script", ["reasoning", "reasoning_content", "think"])
def test_the_clock_starts_at_the_first_token_of_any_kind(
    ask: Any, ask_file: Any, tmp_path: Path, script: str
) -> None:
    line = ask(ask_file(f"say:yes;script:{script}", references=["yes"], metric="exact"))
    assert line["response"] == "yes"
    assert line["scores"] == {"exact": 1.0}
    assert line["reasoning"].startswith("one")
    first, answer, last, end = (
        line[name]
        for name in (
            "time_to_first_token", "time_to_first_answer_token", "time_to_last_token",
            "response_time",
        )
    )  # fmt: skip
    # What the endpoint waits before it sends each; a busy machine takes longer.
    assert first >= 0.15
    assert answer >= 4 * 0.15
    assert end >= 4 * 0.15 + 0.3
    assert first < answer < end
    assert last == answer, "the late usage block is no token"
    assert line["time_per_output_token"] == pytest.approx((last - first) / 3, abs=1e-5)
    (run,) = evaluate(tmp_path).report["runs"]
    assert run["time_to_first_answer_token"]["mean"] == answer
    assert run["time_to_first_token"]["mean"] == first


@pytest.mark.parametrize(
    ("text", "mode", "answer", "reasoning"),
    [
        ("<think>a</think>\n\nyes", "auto", "yes", "a"),
        ("  <think>\na\n</think>yes", "auto", "yes", "a"),
        ("a</think> yes", "auto", "yes", "a"),
        ("<think>a", "auto", "<think>a", ""),
        ("<think>a", "cut", "", "a"),
        ("<think></think>yes", "cut", "yes", ""),
        ("<think>a</think>yes", "keep", "<think>a</think>yes", ""),
        (" plain <b> text", "auto", " plain <b> text", ""),
        ("", "auto", "", ""),
    ],
)
def test_thinking_is_separated(text: str, mode: str, answer: str, reasoning: str) -> None:
    separated = separate(text, Thinking(mode))
    assert (separated.answer, separated.reasoning) == (answer, reasoning)
    assert text[separated.answer_start :] == answer


def test_an_older_file_is_scored_without_its_thinking(
    ask: Any, ask_file: Any, tmp_path: Path
) -> None:
    ask(ask_file("say:yes;", references=["yes"], metric="exact"))
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text().replace('"yes"', '"<think>no?</think>yes"', 1))
    (run,) = evaluate(tmp_path).report["runs"]
    assert run["scores"][0]["values"]["score"] == 100


def test_fields_are_omitted_renamed_and_added(ask: Any, ask_file: Any, endpoint: Scripted) -> None:
    overrides = FieldOverrides(
        omit=("temperature",),
        rename={"max_tokens": "max_completion_tokens"},
        body={"reasoning_effort": "low", "api_key": "sk-1"},
    )
    line = ask(ask_file("one"), max_new_tokens=7, overrides=overrides)
    (asked,) = endpoint.asked()
    assert asked["max_completion_tokens"] == 7
    assert asked["reasoning_effort"] == "low"
    assert not {"max_tokens", "temperature"} & asked.keys()
    assert line["request"] == {
        "omit": ["temperature"],
        "rename": {"max_tokens": "max_completion_tokens"},
        "body": {"reasoning_effort": "low", "api_key": "***"},
    }


def test_a_response_that_is_not_streamed_has_no_first_token(
    ask: Any, ask_file: Any, endpoint: Scripted
) -> None:
    line = ask(ask_file("script:whole"), overrides=FieldOverrides(omit=("stream",)))
    (asked,) = endpoint.asked()
    assert not {"stream", "stream_options"} & asked.keys()
    assert line["time_to_first_token"] is None


def test_a_fixed_length_is_requested(ask: Any, ask_file: Any, endpoint: Scripted) -> None:
    ask(ask_file("one"), max_new_tokens=7, fixed_length=True)
    (asked,) = endpoint.asked()
    assert (asked["ignore_eos"], asked["min_tokens"], asked["max_tokens"]) == (True, 7, 7)


def test_answers_with_other_options_are_not_mixed(ask: Any, ask_file: Any) -> None:
    questions = ask_file("one")
    ask(questions, overrides=FieldOverrides(body={"top_k": 1}))
    with pytest.raises(TitaError, match="answers with other options"):
        ask(questions)
    ask(questions, overrides=FieldOverrides(body={"top_k": 1}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--omit", "nothing"], "requests have no field 'nothing'"),
        (["--rename", "max_tokens"], "not OLD=NEW"),
        (["--rename", "max_tokens=messages"], "'messages' cannot be set"),
        (["--body", "effort=low"], "quote text twice"),
        (["--duration", "60"], "'60' is not a time"),
        (["--sweep", "1,1"], "not a list of distinct numbers"),
        (["--rate", "0"], "--rate: invalid value 0"),
        (["--arrivals", "poisson"], "--arrivals needs --rate"),
    ],
)
def test_invalid_options_are_one_line(
    tita_bench: Bench, ask_file: Any, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = tita_bench(
        "run", "--questions", ask_file("one"), "--out", tmp_path / "r.jsonl",
        "--base-url", "http://127.0.0.1:9/v1", *arguments,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_recorded_command_has_no_secret() -> None:
    words = ["/bin/tita-bench", "run", "--api-key", "sk-1", "--api-key=sk-2", "--key-file", "k.txt"]
    words += [
        "--body",
        'a={"b": [{"token": "sk-6"}]}',
        "--body",
        'my_secret="sk-3"',
        "--base-url",
        "https://u:sk-4@h/v1?key=sk-5",
    ]
    command = masked_command(words)
    assert "sk-" not in command
    for kept in ("tita-bench run", "--key-file k.txt", "my_secret=***", "https://h/v1"):
        assert kept in command
