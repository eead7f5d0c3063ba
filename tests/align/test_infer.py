"""`tita infer`: one answer in the terminal, beside the base's, or token by token."""

import json

import pytest

from tita.cli.commands import app
from tita.cli.main import run
from tita.demo.models import demo_model_path
from tita.demo.scenes import make_scenes, write_scenes


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Both models, an image and the question what is written on it."""
    root = tmp_path_factory.mktemp("scene")
    question = write_scenes(root, make_scenes("test", number=1), name="test")[0]
    base, reward = (str(demo_model_path(role)) for role in ("base", "reward"))
    image = str(root / str(question.image))
    return [
        "infer",
        "--base",
        base,
        "--reward",
        reward,
        "--image",
        image,
        "--question",
        question.text,
    ]


def infer(asked: list[str], *more: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert run(app, [*asked, *more], name="tita") == 0
    return capsys.readouterr().out


def test_the_answer_stands_alone_on_standard_output(
    asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    answer = infer(asked, capsys=capsys)
    assert len(answer.splitlines()) == 1
    assert answer.split()
    assert all(word.isdigit() for word in answer.split())


def test_compare_shows_the_base_beside_it(
    asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    base, guided = infer(asked, "--compare", "--weight", "1", capsys=capsys).splitlines()
    assert base.startswith("base: ")
    assert guided.startswith("w = 1: ")


def test_explained_tokens_are_a_table(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    shown = infer(asked, "--explain", capsys=capsys)
    assert "base %" in shown
    assert "</s>" in shown


def test_scripts_get_json(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (answer,) = json.loads(infer(asked, "-o", "json", "--weight", "0", capsys=capsys))
    assert answer["weight"] == 0
    assert answer["num_changed"] == 0


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--image", "/none.png", "/none.png: no such image"),
        ("--base", "./none", "./none: no such file or folder"),
        ("--weight", "-1", "guidance weight is -1"),
    ],
)
def test_mistakes_are_one_line(
    asked: list[str], option: str, value: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(app, [*asked, option, value], name="tita") == 2
    error = capsys.readouterr().err.strip()
    assert words in error.splitlines()[-1]
