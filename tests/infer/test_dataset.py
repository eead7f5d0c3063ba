"""`tita infer` for many questions: LLaVA's files, resuming, errors per question."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tita.cli.commands import app
from tita.cli.main import run
from tita.records import Question


@pytest.fixture
def folder(scenes: tuple[Path, list[Question]], tmp_path: Path) -> Path:
    """Images, and a question file in LLaVA's format, with numeric ids."""
    root, questions = scenes
    shutil.copytree(root, tmp_path / "data")
    rows = [
        {"question_id": n, "image": question.image, "text": question.text, "category": "default"}
        for n, question in enumerate(questions)
    ]
    write(tmp_path / "data" / "q.jsonl", rows)
    return tmp_path / "data"


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def infer(models: list[str], *more: object, code: int = 0) -> None:
    assert run(app, ["infer", *models, *map(str, more)], name="tita") == code


def test_answers_have_llavas_keys_in_question_order(
    folder: Path, models: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "out" / "answers.jsonl"
    infer(models, "--questions", folder / "q.jsonl", "--out", out, "--batch-size", 3)
    asked, answers = read(folder / "q.jsonl"), read(out)
    # As in llava/eval/eval_pope.py: by id, and by position.
    assert [each["question_id"] for each in answers] == [each["question_id"] for each in asked]
    for question, answer in zip(asked, answers, strict=True):
        assert answer["prompt"] == question["text"]
        assert answer["text"]
        assert answer["error"] is None
        assert answer["model_id"] == models[1]
        assert answer["metadata"]["weight"] == 0.3
    assert len({answer["answer_id"] for answer in answers}) == len(answers)
    capsys.readouterr()
    image = folder / asked[2]["image"]
    infer(models, "--image", image, "--question", asked[2]["text"])
    assert capsys.readouterr().out.strip() == answers[2]["text"]


def test_image_aspect_is_used_and_recorded(folder: Path, models: list[str]) -> None:
    def answered(aspect: str) -> list[dict[str, Any]]:
        out = folder / f"{aspect}.jsonl"
        options = ["--image", folder / "lines", "--question", "what number ?", "--out", out]
        infer(models, *options, "--explain", "--image-aspect", aspect)
        return read(out)

    (folder / "lines").mkdir()
    for number, image in enumerate(sorted(folder.glob("**/*.png"))[:2]):
        Image.open(image).resize((120, 40)).save(folder / "lines" / f"{number}.png")
    auto, pad, keep = (answered(aspect) for aspect in ("auto", "pad", "keep"))
    assert [line["metadata"]["image_aspect"] for line in keep] == ["keep"] * 2
    assert [line["tokens"] for line in auto] == [line["tokens"] for line in pad]
    assert [line["tokens"] for line in auto] != [line["tokens"] for line in keep]


def test_resumed_run_asks_only_missing_questions(
    folder: Path, models: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "answers.jsonl"
    command = ["--questions", folder / "q.jsonl", "--out", out]
    infer(models, *command)
    whole = out.read_text()
    lines = whole.splitlines(keepends=True)
    out.write_text("".join([*lines[:2], *lines[4:-1], lines[-1][:30]]))
    capsys.readouterr()
    infer(models, *command)
    assert out.read_text() == whole
    assert "answered 3 of 3 questions" in capsys.readouterr().err
    before = out.stat()
    infer(models, *command)
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_answers_of_another_model_of_the_same_name_are_not_resumed(
    folder: Path, models: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """As `reward/current` is after a promotion. Files without digests are resumed."""
    out, reward = folder / "answers.jsonl", folder / "reward"
    shutil.copytree(models[3], reward)
    named = [*models[:3], str(reward)]
    infer(named, "--questions", folder / "q.jsonl", "--out", out)
    lines = read(out)
    assert {"base_sha256", "reward_sha256"} < lines[0]["metadata"].keys()
    (reward / "trained_again.txt").write_text("other weights")
    infer(named, "--questions", folder / "q.jsonl", "--out", out, code=2)
    assert "holds answers with reward_sha256" in capsys.readouterr().err
    for line in lines:
        del line["metadata"]["reward_sha256"]
    write(out, lines[:-1])
    infer(named, "--questions", folder / "q.jsonl", "--out", out)
    assert len(read(out)) == len(lines)


def test_a_changed_question_is_asked_again(folder: Path, models: list[str]) -> None:
    out = folder / "answers.jsonl"
    infer(models, "--questions", folder / "q.jsonl", "--out", out)
    rows = read(folder / "q.jsonl")
    rows[1]["text"] = "Is there a 7 in the image?"
    write(folder / "q.jsonl", rows)
    infer(models, "--questions", folder / "q.jsonl", "--out", out)
    assert [each["prompt"] for each in read(out)] == [each["text"] for each in rows]


def test_a_question_whose_image_has_changed_is_asked_again(
    folder: Path, models: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "answers.jsonl"
    command = ["--questions", folder / "q.jsonl", "--out", out]
    infer(models, *command)
    first = read(out)
    assert all(len(line["images_sha256"]) == 64 for line in first)
    names = [row["image"] for row in read(folder / "q.jsonl")]
    (folder / names[1]).write_bytes((folder / names[-1]).read_bytes())
    (folder / names[0]).touch()
    capsys.readouterr()
    infer(models, *command)
    number = names.count(names[1])
    assert f"answered {number} of {number} questions" in capsys.readouterr().err
    second = read(out)
    assert second[1]["images_sha256"] == first[-1]["images_sha256"]
    for line in second:  # as of an older version
        del line["images_sha256"]
    write(out, second)
    (folder / names[0]).write_bytes((folder / names[-1]).read_bytes())
    infer(models, *command)
    assert read(out) == second


def test_errors_are_recorded_and_asked_again(
    folder: Path, models: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read(folder / "q.jsonl")
    image = folder / rows[1]["image"]
    gone = [n for n, row in enumerate(rows) if row["image"] == rows[1]["image"]]
    kept = image.read_bytes()
    image.write_bytes(b"no image")
    rows[-1]["text"] = "what " * 99
    write(folder / "q.jsonl", rows)
    out = folder / "answers.jsonl"
    infer(models, "--questions", folder / "q.jsonl", "--out", out, code=1)
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{len(gone) + 1} of {len(rows)} questions have no answer" in told
    assert "run again" in told
    answers = read(out)
    failed = [n for n, answer in enumerate(answers) if answer["error"]]
    assert failed == [*gone, len(rows) - 1]
    assert "not a readable image" in answers[gone[0]]["error"]
    assert "the prompt has" in answers[-1]["error"]
    assert all(answer["text"] for n, answer in enumerate(answers) if n not in failed)

    image.write_bytes(kept)
    rows[-1]["text"] = "what number ?"
    write(folder / "q.jsonl", rows)
    infer(models, "--questions", folder / "q.jsonl", "--out", out)
    again = read(out)
    assert [each["question_id"] for each in again] == list(range(len(rows)))
    assert not any(each["error"] for each in again)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--weight", "0.5"], "holds answers with weight 0.3, not 0.5; choose another --out"),
        (["--model-id", "other"], "holds answers with model_id"),
        (["--temperature", "1"], "holds answers with temperature 0.0, not 1.0"),
    ],
)
def test_answers_with_other_options_are_not_mixed(
    folder: Path,
    models: list[str],
    more: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = folder / "answers.jsonl"
    write(folder / "one.jsonl", read(folder / "q.jsonl")[:1])
    command = ["--questions", folder / "one.jsonl", "--out", out]
    infer(models, *command)
    before = out.read_text()
    infer(models, *command, *more, code=2)
    assert words in capsys.readouterr().err
    assert out.read_text() == before


def test_one_question_for_each_image_of_a_folder(
    folder: Path, models: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    infer(models, "--image", folder, "--question", "what number is written ?")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert [line["question_id"] for line in lines] == paths
    assert len({line["text"] for line in lines}) > 1


def test_standard_input_is_answered_in_order(
    folder: Path,
    models: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = (folder / "q.jsonl").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    command = ["--questions", "-", "--images", folder, "--batch-size", 2]
    infer(models, *command, "--explain", "--temperature", 2)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["question_id"] for line in lines] == list(range(len(lines)))
    assert all(token["combined"] <= 0 for line in lines for token in line["tokens"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "an empty file"),
        ("\n", "no rows in it"),
        ('{"question_id": 1}\n', "q.jsonl:1: no field 'question'"),
        ('{"question_id": 1, "text": "a"}\n{"question_id": "1", "text": "b"}\n', "already used in"),
        ("{\n", "q.jsonl:1: not JSON"),
        ('{"question_id": 1, "text": "a", "image": "../x.png"}\n', "leaves its folder"),
    ],
)
def test_question_file_errors_come_before_loading(
    folder: Path, content: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "q.jsonl").write_text(content)
    infer(["--base", "./none"], "--questions", folder / "q.jsonl", code=2)
    assert words in capsys.readouterr().err


def test_other_files_are_not_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "q.jsonl").read_text()
    command = ["--questions", folder / "q.jsonl", "--out", folder / "q.jsonl"]
    infer(["--base", "./none"], *command, code=2)
    assert "not a valid answers file; choose another --out" in capsys.readouterr().err
    assert (folder / "q.jsonl").read_text() == before
    infer(["--base", "./none"], "--questions", folder / "gone.jsonl", code=2)
    assert "gone.jsonl: no such file" in capsys.readouterr().err


def test_folder_without_images_is_an_error(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    infer(models, "--image", tmp_path, "--question", "what ?", code=2)
    assert "no images in it" in capsys.readouterr().err
