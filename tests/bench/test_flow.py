"""`tita-bench` commands, each in its own process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.bench.conftest import FIRST_FIELDS
from tita.bench.questions import read_items
from tita.bench.results_file import read_results
from tita.bench.sample import write_sample
from tita.cli import main as cli
from tita.errors import ExitCode

Process = subprocess.CompletedProcess[str]
Bench = Callable[..., Process]


THE_THREE_LINES = r"""
tita-bench sample --out ./api_benchmark_results/sample_questions.jsonl
tita-bench run --api-key $KEY --model deepseek-vl2 --questions ./api_benchmark_results/sample_questions.jsonl \
  --images ./api_benchmark_results --out ./api_benchmark_results/deepseek_vl2_20261122.jsonl
tita-bench eval --dir ./api_benchmark_results
"""  # noqa: E501


@pytest.mark.slow
def test_the_three_commands_of_the_readme(endpoint: Any, tmp_path: Path) -> None:
    """Only the URL in the registry differs from a user's run: it is the scripted endpoint's."""
    registry = tmp_path / "models.yaml"
    registry.write_text(
        "models:\n  deepseek-vl2:\n    id: deepseek-ai/deepseek-vl2\n"
        f"    base_url: {endpoint.base_url}\n"
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"KEY": "sk-secret-1", "TITA_REGISTRY": str(registry), "PATH": path}
    done = subprocess.run(
        ["sh", "-e", "-c", THE_THREE_LINES], cwd=tmp_path, env={**os.environ, **own},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    folder = tmp_path / "api_benchmark_results"
    results = list(read_results(folder / "deepseek_vl2_20261122.jsonl"))
    items = list(read_items(folder / "sample_questions.jsonl"))
    assert sorted(r["question_id"] for r in results) == sorted(item.id for item in items)
    assert all(set(FIRST_FIELDS) <= set(result) for result in results)
    assert {entry["model"] for entry in endpoint.asked()} == {"deepseek-ai/deepseek-vl2"}
    assert sum(len(entry["images"]) for entry in endpoint.asked()) == sum(
        len(item.images) for item in items
    )
    assert {entry["key"] for entry in endpoint.asked()} == {"Bearer sk-secret-1"}
    assert "deepseek-vl2" in done.stdout
    for name in ("report.json", "report.html", "benchmark_report.txt"):
        assert (folder / name).stat().st_size > 500
    everything = done.stdout + done.stderr
    everything += "".join(p.read_text() for p in folder.iterdir() if p.suffix != ".jpg")
    assert "sk-secret-1" not in everything


def test_sample_has_references_for_all_and_images_that_open(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    assert write_sample(path, num=40) == list(read_items(path))
    items = list(read_items(path))
    assert len(items) == 40
    assert all(item.references and item.metric for item in items)
    assert sum(not item.images for item in items) == 8, "one in five is text only"
    assert {item.images[0] for item in items if item.images} == {
        f"sample_{n}.jpg" for n in range(1, 41) if n % 5
    }
    for item in items:
        for image in item.images:
            assert min(Image.open(tmp_path / image).size) > 100
    first = path.read_bytes(), (tmp_path / "sample_1.jpg").read_bytes()
    write_sample(path, num=40)
    assert (path.read_bytes(), (tmp_path / "sample_1.jpg").read_bytes()) == first


def test_an_interrupted_sample_shows_its_progress_and_leaves_the_earlier_one(
    tmp_path: Path,
) -> None:
    write_sample(tmp_path / "q.jsonl", num=2, seed=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    command = [sys.executable, "-c", "from tita.cli.main import tita_bench; tita_bench()"]
    screen, terminal = os.openpty()
    process = subprocess.Popen(
        [*command, "sample", "--num", "100000", "--out", tmp_path / "q.jsonl"], stderr=terminal
    )
    os.close(terminal)
    shown = b""
    while b"/100000" not in shown:
        shown += os.read(screen, 4096)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # its end closes the terminal
        while piece := os.read(screen, 4096):
            shown += piece
    os.close(screen)
    assert process.wait() == ExitCode.INTERRUPTED
    assert b"making questions" in shown
    assert shown.rstrip().endswith(b"interrupted; no question was written")
    assert b"Traceback" not in shown
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_key_from_a_variable_is_sent_to_its_own_endpoint_only(
    tita_bench: Bench, endpoint: Any, ask_file: Any, tmp_path: Path
) -> None:
    questions = ask_file("one")
    registry = tmp_path / "models.yaml"
    registry.write_text(
        f"models:\n  ours:\n    id: a/b\n    base_url: {endpoint.base_url}\n    key_env: OUR_KEY\n"
        "  theirs:\n    id: c/d\n    base_url: https://elsewhere.test/v1\n    key_env: OUR_KEY\n"
    )
    common = ("run", "--questions", questions, "--registry", registry)
    env = {**os.environ, "OUR_KEY": "sk-by-variable"}
    one = tita_bench(*common, "--model", "ours", "--out", tmp_path / "1.jsonl", env=env)
    other = tita_bench(
        *common, "--model", "theirs", "--out", tmp_path / "2.jsonl",
        "--base-url", endpoint.base_url, env=env,
    )  # fmt: skip
    key_file = tmp_path / "key"
    key_file.write_text("sk-by-file\n")
    third = tita_bench(
        *common, "--model", "theirs", "--out", tmp_path / "3.jsonl",
        "--base-url", endpoint.base_url, "--key-file", key_file,
    )  # fmt: skip
    assert [p.returncode for p in (one, other, third)] == [0, 0, 0], one.stderr + other.stderr
    keys = [entry["key"] for entry in endpoint.asked()]
    assert keys == ["Bearer sk-by-variable", None, "Bearer sk-by-file"]
    for process in (one, other, third):
        assert "sk-by" not in process.stdout + process.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nobody/knows"], "no endpoint known for model 'nobody/knows'"),
        (["--base-url", "ftp://x"], "not an HTTP URL"),
        (["--base-url", "http://[::1/v1"], "not an HTTP URL"),
        (["--base-url", "http://x/v1", "--temperature", "inf"], "neither NaN nor infinity"),
        (["--base-url", "http://x:99999/v1"], "not an HTTP URL"),
        (["--model", "qwen2.5-vl"], "no API key for Qwen/Qwen2.5-VL-72B-Instruct; set SILICONFLOW"),
        (["--api-key", "--model", "x"], "--model is an option; is the variable with the key set?"),
        (["--base-url", "http://u:pass@x/v1"], "contains a password"),
        (["--base-url", "http://x/v1", "--reward", "r"], "--reward needs --local-model"),
        (["--weight", "a=1", "--weight", "a=2"], "--weight: two weights of a; leave one of them"),
        (["--base-url", "http://x/v1", "--registry", "bad.yaml"], "models.m.id: field required"),
        (["--base-url", "http://x/v1", "--key-file", "gone"], "gone"),
        (["--base-url", "http://x/v1", "--out", "s3://b/r.jsonl"], "is appended to"),
    ],
)
def test_user_errors_are_one_line(
    tita_bench: Bench, ask_file: Any, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "bad.yaml").write_text("models: {m: {}}\n")
    questions = ask_file("one")
    done = tita_bench("run", "--questions", questions, "--out", "r.jsonl", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "pass" not in done.stderr.replace("password", "")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_counts_are_right_with_all_failures_at_once(
    tita_bench: Bench, endpoint: Any, ask_file: Any, tmp_path: Path
) -> None:
    passing = ("slow", "429,ok", "500,ok", "broken,ok", "cut,ok", "badjson,ok", "hang,ok", "whole")
    lasting = ("400", "500", "cut", "hang")
    questions = ask_file(
        *(f"{n} say:x; script:{script}" for n in range(3) for script in passing),
        *(f"say:x; script:{script}" for script in lasting),
        references=["x"], metric="exact",
    )  # fmt: skip
    folder = tmp_path / "results"
    asked = tita_bench(
        "run", "--questions", questions, "--out", folder / "r.jsonl", "--model", "m",
        "--base-url", endpoint.base_url, "--timeout", "1.5", "--retries", "2",
    )  # fmt: skip
    assert asked.returncode == 1, asked.stderr
    assert "24 questions answered" in asked.stderr
    assert "4 failed" in asked.stderr
    evaluated = tita_bench("eval", "--dir", folder, "-o", "json")
    (run,) = json.loads(evaluated.stdout)["runs"]
    assert (run["num_questions"], run["num_answered"]) == (28, 24)
    assert sum(run["errors"].values()) == 4
    assert run["scores"][0]["values"]["score"] == 100
    assert run["scores"][0]["num_scored"] == 24


def test_failed_questions_make_exit_status_1(
    tita_bench: Bench, endpoint: Any, ask_file: Any, tmp_path: Path
) -> None:
    done = tita_bench(
        "run", "--questions", ask_file("fine", "script:400", "1 script:400"),
        "--out", tmp_path / "r.jsonl", "--model", "m", "--base-url", endpoint.base_url,
        "--api-key", "sk-1",
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2:] == [
        "2 failed: 2 × HTTP 400; run the same command again to retry them",
        "  HTTP 400: no, not with Bearer ***",
    ]


def test_methods_without_any_answer_name_the_servers_error(
    endpoint: Any, ask_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        "sweep", "--questions", ask_file("script:400"), "--out", tmp_path / "out", "--model", "m",
        "--base-url", endpoint.base_url, "--methods", "base,vcd",
    )  # fmt: skip
    with pytest.raises(SystemExit):
        cli.tita_bench([str(argument) for argument in command])
    reason = "no answers of the base to questions (HTTP 400: no, not with None)"
    assert reason in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_sweep_plots_weights_and_compare_gates(
    tita_bench: Bench, endpoint: Any, ask_file: Any, tmp_path: Path
) -> None:
    questions = ask_file(
        "say:red;", "say:the red;", "say:blue;", references=["red"], metric="exact",
    )  # fmt: skip
    swept = tita_bench(
        "sweep", "--weights", "0,0.3", "--questions", questions, "--out", tmp_path / "sweep",
        "--model", "m", "--base-url", endpoint.base_url,
    )  # fmt: skip
    assert swept.returncode == 0, swept.stderr
    files = sorted(path.name for path in (tmp_path / "sweep").glob("*.jsonl"))
    assert files == ["m_w0.3.jsonl", "m_w0.jsonl"]
    assert sorted(entry["guidance_weight"] for entry in endpoint.asked()) == [0] * 3 + [0.3] * 3
    assert "guidance weight" in (tmp_path / "sweep" / "report.html").read_text()
    a, b = (tmp_path / "sweep" / name for name in ("m_w0.jsonl", "m_w0.3.jsonl"))
    even = tita_bench("compare", a, b, "--fail-below", "0", "-o", "json")
    assert even.returncode == 0, even.stderr
    assert json.loads(even.stdout)[0]["overall"]["mean"] == 0
    page = tmp_path / "compare.html"
    broken = tita_bench("compare", a, b, "--fail-below", "1", "--out", page)
    assert broken.returncode == 10
    never = tita_bench("compare", a, b, "--fail-slower", "nan")
    assert never.returncode == 2
    assert never.stderr == "tita-bench: --fail-slower: nan is no finite number; give a number\n"
    assert "gate: score difference +0.00 is below +1" in broken.stderr
    assert "m w=0.3 against m w=0" in page.read_text()


@pytest.mark.parametrize("command", [("run",), ("sweep",), ("sweep", "--methods", "vcd")])
def test_an_engine_is_for_local_models(
    tita_bench: Bench, ask_file: Any, tmp_path: Path, command: tuple[str, ...]
) -> None:
    done = tita_bench(
        *command, "--questions", ask_file("x"), "--out", tmp_path / "r", "--engine", "vllm",
        "--base-url", "http://127.0.0.1:9/v1",
    )  # fmt: skip
    assert done.returncode == 2
    assert "--engine needs --local-model" in done.stderr


@pytest.mark.slow
def test_a_judge_scores_open_answers(
    tita_bench: Bench, endpoint: Any, ask_file: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    questions = ask_file(
        "say:it is 0.5 ;What is x?", "say:seven;What is y?", references=["-1<AND>-5"],
        metric="judge-mm-vet", suite="mm-vet", category="math+ocr",
    )  # fmt: skip
    common = ("--base-url", endpoint.base_url)
    out = folder / "answers.jsonl"
    asked = tita_bench("run", "--questions", questions, "--out", out, "--model", "m", *common)
    assert asked.returncode == 0, asked.stderr
    # The scripted judge answers as the question says: "it is 0.5" is not a valid score.
    judged = tita_bench("judge", "--results", out, "--model", "judge-1", *common)
    assert judged.returncode == 0, judged.stderr
    prompt = endpoint.asked()[-1]["text"]
    assert prompt.startswith("Compare the ground truth and prediction from AI models")
    assert "| -1 <AND> -5 |" in prompt
    lines = list(read_results(folder / "answers.judged.jsonl"))
    assert {line["judges"] for line in lines} == {"answers.jsonl"}
    again = tita_bench("judge", "--results", out, "--model", "judge-1", *common)
    assert "(2 from an earlier run)" in again.stderr
    text = (folder / "answers.judged.jsonl").read_text()
    text = text.replace('"response": "seven"', '"response": "0.5"')
    (folder / "answers.judged.jsonl").write_text(text)
    evaluated = tita_bench("eval", "--dir", folder, "-o", "json")
    (run,) = json.loads(evaluated.stdout)["runs"]
    (score,) = run["scores"]
    assert score["num_scored"] == 1, "an invalid review is not a score"
    assert score["values"]["score"] == 50
    assert score["by_category"].keys() == {"math", "math+ocr", "ocr"}
    assert score["protocol"]["rule"] == "judged by judge-1"
    assert "correctness score is 0.0 (totally wrong)" in score["protocol"]["judge_prompt"]
    assert "judged by judge-1" in (folder / "report.html").read_text()


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from tita.cli.main import tita_bench\n"
        "try:\n    tita_bench(['--help'])\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'httpx', 'numpy', 'pydantic', 'boto3', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("sample", "prepare", "run", "sweep", "judge", "eval", "compare"):
        assert command in done.stdout
