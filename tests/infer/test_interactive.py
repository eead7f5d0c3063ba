"""`tita infer` for one question: streamed, explained, or compared with the base."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tita.align import TokenOutput
from tita.cli.commands import app
from tita.cli.main import run
from tita.infer.interactive import style_of
from tita.records import Question


@pytest.fixture(scope="module")
def asked(scenes: tuple[Path, list[Question]], models: list[str]) -> list[str]:
    """Arguments: both models, an image and a question."""
    root, questions = scenes
    image = str(root / str(questions[0].image))
    return ["infer", *models, "--image", image, "--question", questions[0].text]


def infer(asked: list[str], *more: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert run(app, [*asked, *more], name="tita") == 0
    return capsys.readouterr().out


def test_standard_output_has_the_answer_only(
    asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    answer = infer(asked, capsys=capsys)
    assert len(answer.splitlines()) == 1
    assert answer.split()
    assert all(word.isdigit() for word in answer.split())


def test_compare_shows_the_bases_answer(
    asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    base, guided = infer(asked, "--compare", "--weight", "1", capsys=capsys).splitlines()
    assert base.startswith("base: ")
    assert guided.startswith("w = 1: ")


def test_answers_have_the_weights_of_named_reward_models(
    asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the default weight, which does not apply then."""
    place = asked.index("--reward") + 1
    named = [*asked[:place], f"faithful={asked[place]}", *asked[place + 1 :]]
    named += ["--weight", "faithful=1"]
    base, guided = infer(named, "--compare", capsys=capsys).splitlines()
    assert base.startswith("base:  ")
    assert guided.startswith("faithful = 1: ")
    (answer,) = json.loads(infer(named, "-o", "json", capsys=capsys))
    assert answer["weights"] == {"faithful": 1}
    assert "weight" not in answer


def test_explained_tokens_are_a_table(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    shown = infer(asked, "--explain", capsys=capsys)
    assert "base %" in shown
    assert "</s>" in shown


def test_json_output(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (answer,) = json.loads(infer(asked, "-o", "json", "--weight", "0", capsys=capsys))
    assert answer["weight"] == 0
    assert answer["num_changed"] == 0


class Paper(io.StringIO):
    """Standard output that records each write."""

    def __init__(self) -> None:
        super().__init__()
        self.writings: list[str] = []

    def write(self, text: str) -> int:
        self.writings.append(text)
        return super().write(text)


def test_text_is_streamed(
    asked: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--temperature", "5", "--max-new-tokens", "12", "--seed", "1"]
    whole = infer(asked, *more, capsys=capsys)
    paper = Paper()
    monkeypatch.setattr(sys, "stdout", paper)
    assert run(app, [*asked, *more], name="tita") == 0
    assert paper.getvalue() == whole
    assert len([text for text in paper.writings if text.strip()]) > 1


def on_a_terminal(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Output of the command if standard output is a terminal."""
    leader, follower = os.openpty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert run(app, arguments, name="tita") == 0
        terminal.flush()
    written = os.read(leader, 2**16).decode()
    os.close(leader)
    return written


def test_terminal_shows_changes_in_colour(
    asked: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--weight", "2", "--temperature", "4", "--seed", "1"]
    plain = infer(asked, *more, capsys=capsys)
    shown = on_a_terminal([*asked, *more, "--explain"], monkeypatch)
    assert "\x1b[" in shown
    for word in plain.split():
        assert word in shown
    assert "by the reward model" in capsys.readouterr().err


def test_terminal_shows_both_answers_side_by_side(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = on_a_terminal([*asked, "--compare"], monkeypatch)
    (heading,) = [line for line in shown.splitlines() if "base" in line]
    assert "w = 0.3" in heading


def test_colour_shows_direction_and_size() -> None:
    def style(base: float, combined: float, **more: Any) -> str:
        logs = {"base": math.log(base), "logprob": math.log(combined)}
        return style_of(
            TokenOutput(id=1, text="a", token="a", **{"changed": False, **logs, **more})
        )

    assert style(0.5, 0.5) == ""
    assert style(0.5, 0.6) == "dim green"
    assert style(0.4, 0.8) == "green"
    assert style(0.01, 0.9, changed=True) == "bold green underline"
    assert style(0.9, 0.5) == "red"


def test_question_from_standard_input(
    asked: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = infer(asked, capsys=capsys)
    monkeypatch.setattr(sys, "stdin", io.StringIO(asked[-1] + "\n"))
    assert infer([*asked[:-1], "-"], capsys=capsys) == wanted


def test_control_tokens_in_a_question_are_escaped(
    asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer(asked, "--question", "what </s> is <image> ?", capsys=capsys).strip()


def test_reference_model_is_used(
    asked: list[str], models: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """With the reward model as its own reference, guidance has no effect."""
    alone = infer(asked, "--weight", "0", capsys=capsys)
    same = infer(asked, "--form", "dpo", "--reference", models[3], "--weight", "5", capsys=capsys)
    assert same == alone


NONE = "/none.png: no such image"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--image", "/none.png"], NONE),
        (["--base", "./none"], "./none: no such file or folder"),
        (["--reward", "./none"], "several reward models without names"),
        (["--weight", "-1"], "--weight is -1; give a number from 0 to 100"),
        (["--form", "sum"], "no guidance form 'sum'; choose tita, genarm, dpo, vcd, "),
        (["--form", "dpo"], "--form dpo without --reference"),
        (["--reference", "x"], "--reference with --form tita"),
        (["--plausibility", "2"], "--plausibility"),
        (["--top-p", "0.9"], "--top-p without --temperature"),
        (["--top-k", "3"], "--top-k without --temperature"),
        (["--top-p", "0", "--temperature", "1"], "top_p is 0"),
        (["--dtype", "int3"], "--dtype"),
        (["--question", " "], "the question is empty"),
        (["--question", "what " * 99], "the prompt has 106 tokens, more than 63"),
        (["--questions", "q.jsonl"], "--question beside --questions"),
        (["--images", "."], "--images without --questions"),
        (["--out", "a.jsonl"], "--out for one question"),
        (["--image", "."], "a folder beside other images"),
        (["--compare", "--weight", "0"], "--compare without guidance"),
    ],
)
def test_errors_are_one_line(
    asked: list[str], more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if more[0] == "--image" and words == NONE:
        asked = [word for word in asked if not word.endswith(".png") and word != "--image"]
    assert run(app, [*asked, *more], name="tita") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "more",
    [
        ["--weight", "0.3"],
        ["--reference", "x"],
        ["--plausibility", "0.1"],
        ["--form", "genarm"],
        ["--compare"],
    ],
)
def test_guidance_options_need_a_reward_model(
    asked: list[str], more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    alone = [asked[0], *asked[1:3], *asked[5:]]
    assert run(app, [*alone, *more], name="tita") == 2
    assert "; give --reward" in capsys.readouterr().err


def test_decompression_bombs_are_refused(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import PIL.Image

    PIL.Image.new("1", (12_000, 9_000)).save(tmp_path / "bomb.png")
    asked = [*asked[:5], "--question", "what ?", "--image", str(tmp_path / "bomb.png")]
    assert run(app, asked, name="tita") == 2
    assert "12000 x 9000 pixels are more than" in capsys.readouterr().err


def test_options_are_checked_before_torch_is_loaded() -> None:
    code = (
        "import sys\n"
        "from tita.cli.commands import app\n"
        "from tita.cli.main import run\n"
        "status = run(app, sys.argv[1:], name='tita')\n"
        "assert status == 2, status\n"
        "assert 'torch' not in sys.modules\n"
    )
    arguments = ["infer", "--base", "x", "--question", "y", "--image", "/none.png"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "more", [(), ("--question", "caf\udce9"), ("--stop", "\udce9"), ("--guidance-text", "\udce9")]
)
def test_text_in_another_encoding_is_called_so(
    more: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run(app, ["infer", "--base", "b", "--question", "-", *more], name="tita") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "has bytes that are not utf-8; set LANG to the encoding of the terminal" in line
