"""Files as users have them: exports of pandas and Excel, marks and ends of other tools, NaN.

Each is read completely, with the right values, or refused with a line that says what is wrong.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.test_embedded_images import encoded, image_bytes
from tita.cli.commands import app
from tita.cli.main import run
from tita.data import open_dataset
from tita.data.convert import to_question
from tita.data.layouts import Example, read_examples
from tita.data.rows import RawRow, read_rows
from tita.errors import TitaError
from tita.settings import settings

NAN = math.nan


def read(**row: Any) -> Example:
    (example,) = read_examples(RawRow(where="rows:1", file=Path("rows"), id="rows:1", content=row))
    return example


def refusal(**row: Any) -> str:
    with pytest.raises(TitaError) as raised:
        read(**row)
    assert raised.value.remedy
    return str(raised.value)


# Files

READ = {
    "with the index of pandas": (".csv", ",question,image\n0,What?,a.png\n1,Where?,a.png\n"),
    "with Excel's byte order mark": (".csv", "\ufeffquestion,image\nWhat?,a.png\nWhere?,a.png\n"),
    "with lines of Windows": (".jsonl", '{"question":"What?","image":"a.png"}\r\n' * 1
                              + '{"question":"Where?","image":"a.png"}\r\n'),
    "an array in lines": (".json", json.dumps(
        [{"question": "What?", "image": "a.png"}, {"question": "Where?", "image": "a.png"}],
        indent=2)),
    "with columns that end in nothing": (".csv", "question,image,\nWhat?,a.png,\nWhere?,a.png,\n"),
    "with two such columns": (".csv", "question,image,,\nWhat?,a.png,,\nWhere?,a.png,,\n"),
    "with lists in cells": (".tsv", "question\timage\nWhat?\t['a.png']\nWhere?\t[\"a.png\"]\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_files_that_are_read(name: str, tmp_path: Path) -> None:
    suffix, text = READ[name]
    (tmp_path / "a.png").write_bytes(image_bytes("PNG"))
    path = tmp_path / f"rows{suffix}"
    path.write_text(text, encoding="utf-8", newline="")
    questions = list(open_dataset(path).questions())
    assert [question.text for question in questions] == ["What?", "Where?"]
    assert [question.image for question in questions] == ["a.png", "a.png"]


REFUSED: Mapping[str, tuple[str, bytes, str]] = {
    "a column twice": (
        ".csv", b"question,image,image\nWhat?,a.png,b.png\n",
        "rows.csv:1: two columns have the name 'image'",
    ),
    "a key twice": (
        ".jsonl", b'{"question": "q", "image": "a.png", "image": "b.png"}\n',
        "rows.jsonl:1: the key 'image' twice in one object",
    ),
    "a key twice in an array": (
        ".json", b'[{"question": "q", "question": "r"}]', "the key 'question' twice",
    ),
    "semicolons": (".csv", b"question;image\nWhat?;a.png\n", "separated by ';'"),
    "tabs in a .csv": (".csv", b"question\timage\nWhat?\ta.png\n", "separated by '\\t'"),
    "Excel's separator line": (".csv", b"sep=,\nquestion,image\nq,a.png\n", "Excel's separator"),
    "Windows-1252": (
        ".csv", "question,image\na,a.png\nCafé?,a.png\n".encode("cp1252"),
        "rows.csv:3: not UTF-8; it may be Windows-1252",
    ),
    "UTF-16 without a mark": (
        ".csv", "question,image\nWhat?,a.png\n".encode("utf-16-le"), "UTF-16, not UTF-8",
    ),
    "UTF-16 without a mark, big end first": (
        ".jsonl", '{"question": "q"}\n'.encode("utf-16-be"), "UTF-16, not UTF-8",
    ),
    "Arrow": (".arrow", b"ARROW1\0\0\xff\xff\xff\xff", "an Arrow file; write it as Parquet"),
    "a stream of Arrow": (".arrow", b"\xff\xff\xff\xff\x10\0\0\0", "an Arrow file"),
    "several answers, as in HA-DPO": (
        ".json", b'[{"question": "q", "image_id": 1, "chosen": ["a", "b"], "rejected": ["c"]}]',
        "'chosen' is a list of 2 values, not a text; write a row for each",
    ),
    "a list of datasets, as of MMPR": (
        ".json", json.dumps({"m": {"root": "images", "annotation": "m.jsonl"}}, indent=1).encode(),
        "a list of datasets: 'm'; name one of their files, such as m.jsonl, and its `root`",
    ),
    "names of columns only": (".csv", b"question,image\n", "no rows in it"),
    "an empty array": (".json", b"[]", "no rows in it"),
    "blank lines": (".jsonl", b"\n\n", "no rows in it"),
    "rows inside of an object": (
        ".json", json.dumps({"data": [{"question": "q"}]}, indent=1).encode(),
        "its rows are in 'data'",
    ),
    "rows by id": (
        ".json", json.dumps({"1": {"question": "q"}}, indent=1).encode(), "the row has 1",
    ),
    "columns of pandas": (".json", b'{"question": ["q", "r"]}', "'question' is a list of 2 values"),
    "an unnamed column of texts": (".csv", b",question\nbe kind,What?\n", "--ignore-column ''"),
    "notes in one of two unnamed columns": (
        ".csv", b"question,image,,\nWhat?,a.png,be kind,\n", "--ignore-column ''",
    ),
    "notes in the other": (
        ".csv", b"question,image,,\nWhat?,a.png,,be kind\n", "--ignore-column 'column 4'",
    ),
    "blanks in names": (".csv", b"question ,image\nWhat?,a.png\n", "has 'question ', image"),
    "a number that is none": (".jsonl", b'{"question": "q", "answer": Infinity}\n', "not a text"),
    "an image that is no number": (".jsonl", b'{"question": "q", "image": NaN}', "of type float"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suffix, content, message = REFUSED[name]
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    assert run(app, ["data", "validate", str(path)], name="tita") == 2
    said = capsys.readouterr()
    assert message in said.out + said.err
    with pytest.raises(TitaError):
        list(open_dataset(path).questions())


def test_an_object_over_several_lines_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    path.write_text(json.dumps({"question": "What?", "answer": "x"}, indent=2))
    (row,) = read_rows(path)
    assert row.where == f"{path}, entry 1"
    assert read_examples(row)[0].references == ("x",)


# Missing values and numbers


def test_what_pandas_writes_for_missing_values_is_no_value() -> None:
    assert read(question="q", answer=NAN, category=NAN).references == ()
    assert read(question="q", answers=["a", NAN, None]).references == ("a",)
    options = {"A": "x", "B": "y", "C": "nan", "D": NAN}
    assert read(question="q", **options, answer="A", hint="nan").choices == ("x", "y")
    assert "pandas writes for a missing value" in refusal(question="q", answer="nan")
    assert "empty or not a string" in refusal(question="q", answer="\u200b")


def test_whole_numbers_are_written_without_a_fraction() -> None:
    # pandas stores integers as floats where one of them is missing.
    assert read(question="q", answer=3.0, category=2.0).references == ("3",)
    assert read(question="q", answer=3.0, category=2.0).category == "2"
    assert read(question="q", answer=3.5).references == ("3.5",)
    assert read(question="q", answer="3.0").references == ("3.0",)


# Options


def test_options_keep_their_letters() -> None:
    assert read(question="q", choices=["A. x", "B. y"]).choices == ("x", "y")
    assert read(question="q", options=["(A) x", "(B) y"]).choices == ("x", "y")
    assert read(question="q", choices=["A dog", "B"]).choices == ("A dog", "B")
    assert read(question="q", choices={"text": ["x", "y"], "label": ["A", "B"]}).choices == (
        "x", "y",
    )  # fmt: skip
    assert "begin with B, A" in refusal(question="q", choices=["B. x", "A. y"])
    for labels in (["B", "A"], ["1", "2"]):
        choices = {"text": ["x", "y"], "label": labels}
        assert "has the labels" in refusal(question="q", choices=choices, answer=labels[0])
    assert "has the labels a, b" in refusal(question="q", choices={"a": "x", "b": "y"})


@pytest.mark.parametrize("gap", [None, "", "nan", NAN])
def test_an_absent_option_never_shifts_the_letters(gap: Any) -> None:
    assert "B is empty" in refusal(question="q", choices=["x", gap, "y"], answer="C")
    assert "B is empty" in refusal(question="q", A="x", B=gap, C="y", answer="C")
    assert read(question="q", choices=["x", "y", gap]).choices == ("x", "y")


# Images that are elsewhere


@pytest.mark.parametrize("column", ["url", "coco_url", "flickr_url"])
def test_the_url_of_an_image_is_ignored_only_beside_the_image(column: str) -> None:
    row = {"question": "q", column: "https://example.org/a.png"}
    assert read(**row, image="a.png").images == ("a.png",)
    assert f"not used in the question layout: {column!r}" in refusal(**row)


def test_metadata_with_an_image_or_a_system_prompt_is_no_metadata() -> None:
    assert "'metadata'" in refusal(question="q", metadata={"image": "a.png"})
    assert "'meta'" in refusal(question="q", image="a.png", meta='{"system": "Be brief."}')
    metadata = {"category": "x", "image": "a.png"}
    assert read(question="q", image="a.png", metadata=metadata).images == ("a.png",)


# Marks and templates of other tools


@pytest.mark.parametrize(
    "mark",
    [
        "<image>", "<Image>", "[IMG]", "(<image>./</image>)\n", "<img><IMG_CONTEXT></img>",
        "<|begin_of_image|><|image|><|end_of_image|>", "<image></image>", "<Img><ImageHere></Img> ",
        "<|vision_start|><|image_pad|><|vision_end|>", "<img>a.png</img>\n", "<image 1>",
    ],
)  # fmt: skip
def test_marks_of_other_tools_are_the_image(mark: str) -> None:
    example = read(question=f"{mark}What?", image="a.png")
    assert (example.question, example.images) == ("What?", ("a.png",))


@pytest.mark.parametrize(
    "mark",
    [
        "<img_1>", "{image}", "{{image_1}}", "<image_token>", "<|imgpad|>", "![a](b.png)",
        '<img src="b.png">', "<|vision_start|>", "<image_start><image><image_end>", "[IMAGE]",
        "</image>", "<image: b.png>",
    ],
)  # fmt: skip
def test_marks_that_are_not_known_are_refused(mark: str) -> None:
    assert "which may stand for an image" in refusal(question=f"{mark} What?", image="a.png")


def test_words_about_images_are_no_marks() -> None:
    for text in ("Which <television> is it?", "Image: what?", "Is a < image > b?", "[1] or {x}?"):
        assert read(question=text, image="a.png").question == text


@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n", "[INST] What? [/INST]",
        "USER: What? ASSISTANT:", "Human: What?\n\nAssistant:", "<start_of_turn>user\nWhat?",
        "<|start_header_id|>user<|end_header_id|>What?",
    ],
)  # fmt: skip
def test_texts_in_a_chat_template_are_not_put_into_another_one(text: str) -> None:
    pair = {"chosen": "a", "rejected": "b", "image": "a.png"}
    assert "in a chat template already" in refusal(prompt=text, **pair)
    assert "in a chat template already" in refusal(**(pair | {"chosen": text}), prompt="What?")
    message = {"role": "system", "content": text}
    assert "in a chat template already" in refusal(
        messages=[message, {"role": "user", "content": "q"}]
    )


ENDS = ("</s>", "<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|endoftext|>", "<eos>")


@pytest.mark.parametrize("end", ENDS)
def test_ends_of_turns_are_no_part_of_answers(end: str) -> None:
    pair = read(question="q", chosen=f"a{end}", rejected=f"b {end}\n", image="a.png")
    assert (pair.chosen, pair.rejected) == ("a", "b")
    assert read(question="q", answers=[f"red{end}"]).references == ("red",)
    turns = [["human", "q"], ["gpt", f"a{end}"], ["human", "r"], ["gpt", f"b{end}"]]
    row = RawRow(
        where="rows:1",
        file=Path("rows"),
        id="rows:1",
        content={"conversations": [{"from": role, "value": text} for role, text in turns]},
    )
    first, second = read_examples(row)
    assert first.references == ("a",)
    assert [turn.text for turn in second.context] == ["q", "a"]
    assert second.references == ("b",)
    same = {"question": "q", "image": "a.png", "rejected": "a"}
    assert "chosen and rejected are the same" in refusal(**same, chosen=f"a{end}")
    assert "is empty" in refusal(**same, chosen=end)


def test_scores_of_answers_are_metadata(tmp_path: Path) -> None:
    """As in the preference sets of TRL and Argilla."""
    row = {"prompt": "What?", "image": "a.png", "chosen": "a", "rejected": "b"}
    scores = {"score_chosen": 4.5, "score_rejected": 1.0, "chosen-rating": 5, "rejected-model": "m"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row | scores))
    (pair,) = open_dataset(tmp_path / "pairs.jsonl").pairs()
    assert (pair.chosen, pair.rejected) == ("a", "b")


# Parquet


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TITA_CACHE_DIR", str(tmp_path / "cache"))
    settings.cache_clear()
    return tmp_path / "cache" / "rows" / "images"


def parquet(path: Path, *rows: dict[str, Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def test_parquet_with_images_in_base64(tmp_path: Path, cache: Path) -> None:
    path = parquet(tmp_path / "q.parquet", {"question": "What?", "image": encoded("PNG")})
    dataset = open_dataset(path)
    (question,) = dataset.questions()
    assert dataset.images == cache
    assert (cache / str(question.image)).read_bytes() == image_bytes("PNG")


def test_parquet_with_images_that_only_later_rows_embed_is_refused(tmp_path: Path) -> None:
    rows = [{"question": "What?", "image": "a.png"}] * 40
    path = parquet(tmp_path / "q.parquet", *rows, {"question": "q", "image": encoded("PNG")})
    with pytest.raises(TitaError, match="row 41: an image in the row, and none in the first rows"):
        list(open_dataset(path).questions())


def test_parquet_with_structs_of_other_rows_and_many_images(tmp_path: Path, cache: Path) -> None:
    """Arrow gives every row the fields that any row has, with nulls."""
    image = {"type": "image", "text": None}
    text = {"type": "text", "text": "Which is red?"}
    stored = {"bytes": image_bytes("PNG"), "path": None}
    path = parquet(
        tmp_path / "q.parquet",
        {
            "messages": [{"role": "user", "content": [image, image, text], "tool_calls": None}],
            "images": [stored, {"bytes": image_bytes("GIF"), "path": "b.gif"}],
            "system": None,
            "answer": 2.0,
        },
        {
            "messages": [{"role": "user", "content": [text], "tool_calls": None}],
            "images": [],
            "system": "Be brief.",
            "answer": None,
        },
    )
    two, none = (read_examples(row)[0] for row in read_rows(path))
    assert (two.question, two.images) == ("Which is red?", (stored["bytes"], image_bytes("GIF")))
    assert two.references == ("2",)
    assert (none.images, [turn.text for turn in none.context]) == ((), ["Be brief."])


def test_annotators_without_an_answer_are_counted() -> None:
    ten = ["grey"] * 3 + [""] * 7
    assert read(question="q", answers=ten).references == tuple(ten)
    objects = [{"answer": text} for text in ten]
    assert read(question="q", answers=objects, image="a.png").references == tuple(ten)
    assert read(question="q", answers=["", ""]).references == ()
    example = read(question="q", answers=["", "grey"])
    row = RawRow(where="rows:1", file=Path("rows"), id="rows:1", content={})
    question = to_question(example, row, resolve_image=lambda image, row: str(image))
    assert question.references == ("grey",), "for `build-pairs`, which takes the first one"


def test_tuples_of_python_are_lists() -> None:
    assert read(question="q", answers="('stop', 'a stop sign')").references == (
        "stop", "a stop sign",
    )  # fmt: skip
    assert read(question="q", image="('a.png', 'b.png')").images == ("a.png", "b.png")
    for text in ("(a)", "(2, 3)", "('a')", "(left"):
        assert read(question="q", answer=text).references == (text,)


@pytest.mark.parametrize("text", ["['a stop' 'a sign']", "['a stop'\n 'a sign']"])
def test_an_array_that_numpy_printed_is_refused(text: str) -> None:
    assert "a list in a text that cannot be read" in refusal(question="q", answers=text)


@pytest.mark.parametrize("text", ["{{1}}", "{[1]: 2}", "{{}}", "[{}, {[]}]"])
def test_brackets_that_are_no_value_of_python_are_text(text: str) -> None:
    assert read(question=text, image="a.png").question == text


def test_a_message_says_one_thing() -> None:
    message = {"role": "user", "content": "q"}
    assert read(messages=[{**message, "from": None, "value": "q"}]).question == "q"
    for more in ({"from": "gpt"}, {"value": "r"}):
        assert "contains a message with different" in refusal(messages=[{**message, **more}])


def test_a_blank_image_among_others_is_refused() -> None:
    for images in ([""], ["", "a.png"], "['a.png', ' ']"):
        assert "'images' contains a blank image" in refusal(question="q", images=images)
