"""Invalid datasets: `tita data validate` reports each in one line with position and remedy.

Each case is a valid dataset with one error. The jobs read with the same code.
"""

import base64
import gzip
import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from tita.cli.commands import app
from tita.cli.main import run

PAIR: dict[str, Any] = {
    "id": "p",
    "image_id": "images/a.png",
    "question": "What?",
    "chosen": "a",
    "reject": "b",
}
QUESTION: dict[str, Any] = {"question_id": 1, "text": "What?", "image": "images/a.png"}
Case = Callable[[Path], None]


def picture(kind: str = "PNG", *, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((20, 20), 50).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few dozen bytes whose header says 100,000 by 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def line(row: dict[str, Any] | bytes | str, *, before: object = None) -> Case:
    """A second line after a valid one."""

    def make(folder: Path) -> None:
        bad = (
            row
            if isinstance(row, bytes)
            else (row if isinstance(row, str) else json.dumps(row)).encode()
        )
        first = json.dumps({**PAIR, "id": "first"} if before is None else before).encode()
        (folder / "data.jsonl").write_bytes(first + b"\n" + bad + b"\n")

    return make


def pair(**changes: Any) -> Case:
    return line({k: v for k, v in (PAIR | changes).items() if v is not ...})


def question(**changes: Any) -> Case:
    return line({k: v for k, v in (QUESTION | changes).items() if v is not ...})


def image(content: bytes, name: str = "bad.png") -> Case:
    def make(folder: Path) -> None:
        (folder / "images" / name).write_bytes(content)
        pair(image_id=f"images/{name}")(folder)

    return make


def file(name: str, content: bytes) -> Case:
    def make(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return make


def link(folder: Path) -> None:
    outside = folder.parent / f"{folder.name}-outside.png"
    outside.write_bytes(picture())
    os.symlink(outside, folder / "images" / "link.png")
    pair(image_id="images/link.png")(folder)


def looping_link(folder: Path) -> None:
    os.symlink("loop.png", folder / "images" / "loop.png")
    pair(image_id="images/loop.png")(folder)


def other_letters(folder: Path) -> None:
    (folder / "images" / "Cat.PNG").write_bytes(picture())
    pair(image_id="images/cat.png")(folder)


def parquet(rows: list[dict[str, Any]], *, cut: int = 0, damage: bool = False) -> Case:
    def make(folder: Path) -> None:
        path = folder / "data.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="none")
        content = bytearray(path.read_bytes())
        if damage:  # a page's header
            content[4:12] = b"\xff" * 8
        path.write_bytes(content[: len(content) - cut])

    return make


def empty_parquet(folder: Path) -> None:
    table = pyarrow.Table.from_pylist([PAIR]).slice(0, 0)
    pyarrow.parquet.write_table(table, folder / "data.parquet")


def saved(damage: Callable[[Path], None]) -> Case:
    def make(folder: Path) -> None:
        datasets.Dataset.from_list([PAIR]).save_to_disk(folder)
        damage(folder)

    return make


def splits(folder: Path) -> None:
    table = datasets.Dataset.from_list([PAIR])
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(folder)


def message(text: Any, role: str = "assistant") -> list[dict[str, Any]]:
    return [{"role": role, "content": text}]


def rated(*ratings: str) -> list[dict[str, Any]]:
    return [
        {"response": f"answer {n}", "annotations": {"Helpfulness": {"Rating": rating}}}
        for n, rating in enumerate(ratings)
    ]


def compared(**changes: Any) -> Case:
    """A row of LLaVA-RLHF."""
    row = {
        "image": "images/a.png",
        "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": ""}],
        "output_1": {"from": "llava", "value": "a"},
        "output_2": {"from": "llava", "value": "b"},
        "preference": 1,
    }
    return line(row | changes)


def openai(image: str | None = None, **changes: Any) -> Case:
    """A row for OpenAI's fine-tuning by preference."""
    url = image or f"data:image/png;base64,{base64.b64encode(picture()).decode()}"
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]
    row = {
        "input": {"messages": message(parts, "user")},
        "preferred_output": message("a"),
        "non_preferred_output": message("b"),
    }
    return line(row | changes)


SECOND = "data.jsonl:2: "
VALID_ROW = PAIR | {"id": "first"}

CASES: dict[str, tuple[Case, str, str]] = {
    # encodings and containers
    "UTF-16": (file("data.jsonl", json.dumps(PAIR).encode("utf-16")), "data.jsonl: ", "UTF-16"),
    "UTF-16, big end first": (
        file("data.jsonl", b"\xfe\xff" + json.dumps(PAIR).encode("utf-16-be")),
        "data.jsonl: ",
        "UTF-16",
    ),
    "latin-1": (line(b'{"question": "\xfc"}'), SECOND, "not UTF-8"),
    "NUL bytes": (line(b'{"question": "a\0b"}'), SECOND, "contains NUL bytes"),
    "half a character": (
        line('{"image_id":"images/a.png","question":"\\ud83d","chosen":"a","reject":"b"}'),
        SECOND,
        "half a character",
    ),
    "half a character in a name": (
        question(category="\ud83d"),
        SECOND,
        "'category' contains a lone",
    ),
    "gzip": (file("data.jsonl", gzip.compress(b"{}")), "data.jsonl: ", "compressed by gzip"),
    "zstd": (file("data.jsonl", b"\x28\xb5\x2f\xfd....."), "data.jsonl: ", "compressed by zstd"),
    "zip": (file("data.jsonl", b"PK\x03\x04....."), "data.jsonl: ", "a zip archive"),
    "Parquet named JSONL": (
        file("data.jsonl", b"PAR1....."),
        "data.jsonl: ",
        "rename it to .parquet",
    ),
    "an empty file": (file("data.jsonl", b""), "data.jsonl: ", "an empty file"),
    "an empty folder": (lambda folder: None, ": ", "no .jsonl or .parquet file in it"),
    "a folder named as a file": (
        lambda folder: (folder / "data.jsonl").mkdir(),
        ": ",
        "no .jsonl or .parquet file in it",
    ),
    "a line without end": (line(b'"' + b"x" * (17 << 20)), SECOND, "a line of more than 16 MiB"),
    # JSON
    "not JSON": (line("{"), SECOND, "not JSON"),
    "half a line": (line(json.dumps(PAIR)[:30]), SECOND, "not JSON"),
    "two objects in a line": (line(json.dumps(PAIR) * 2), SECOND, "not JSON (Extra data"),
    "single quotes": (line(str(PAIR)), SECOND, "not JSON"),
    "a number": (line("3"), SECOND, "not a JSON object"),
    "an array": (line(json.dumps([PAIR])), SECOND, "not a JSON object"),
    "brackets without end": (
        line("[" * 100_000),
        SECOND,
        "too many digits",
    ),
    "digits without end": (
        line('{"id": ' + "1" * 5000 + "}"),
        SECOND,
        "too many digits",
    ),
    # fields
    "no question": (pair(question=...), SECOND, "no field 'question'"),
    "no chosen": (pair(chosen=...), SECOND, "no field 'chosen'"),
    "chosen null": (pair(chosen=None), SECOND, "no field 'chosen'"),
    "no rejected": (pair(reject=...), SECOND, "no field 'rejected'"),
    "no image": (pair(image_id=...), SECOND, "no field 'image_id'"),
    "an empty text": (question(text=""), SECOND, "'text' is empty"),
    "a blank answer": (pair(chosen=" \n"), SECOND, "'chosen' is empty"),
    "a number for text": (pair(chosen=3), SECOND, "'chosen' is empty or not a string"),
    "a list for text": (question(text=["x"]), SECOND, "'text' is empty or not a string"),
    "only the image's mark": (question(text="<image>\n"), SECOND, "'text' is empty"),
    "an id of another type": (question(question_id=[1]), SECOND, "neither a string nor an integer"),
    "an id twice": (
        line(QUESTION, before=QUESTION),
        SECOND,
        "id '1' is used by a previous row of the file",
    ),
    "a pair's id twice": (
        line(PAIR, before=PAIR),
        SECOND,
        "id 'p' is used by a previous row of the file",
    ),
    "chosen is rejected": (pair(reject="a"), SECOND, "chosen and rejected are the same"),
    "the same but for blanks": (pair(chosen="a b", reject=" a  b\n"), SECOND, "are the same"),
    "a rating that is no number": (
        question(image=..., img_path="images/a.png", completions=rated("5", "nan")),
        SECOND,
        "with one that is no number",
    ),
    # conversations
    "an unknown role": (pair(chosen=message("a", "tool")), SECOND, "of role 'tool'"),
    "a message without text": (pair(chosen=message(None)), SECOND, "a message without text"),
    "not a message": (
        pair(chosen=[{"role": "assistant", "content": "a"}, "b"]),
        SECOND,
        "not a message",
    ),
    "the user's last word": (pair(chosen=message("a", "user")), SECOND, "does not end with"),
    "the assistant's last word": (
        pair(question=..., prompt=[*message("Q", "user"), *message("A")]),
        SECOND,
        "'prompt' does not end with a question",
    ),
    "different prompts": (
        pair(
            question=...,
            chosen=[*message("Q", "user"), *message("a")],
            reject=[*message("R", "user"), *message("b")],
        ),
        SECOND,
        "answer different prompts",
    ),
    # image paths
    "out of the folder": (pair(image_id="../a.png"), SECOND, "leaves its folder"),
    "out, in the middle": (pair(image_id="images/../../a.png"), SECOND, "leaves its folder"),
    "absolute": (pair(image_id="/etc/passwd"), SECOND, "leaves its folder"),
    "a drive": (pair(image_id="C:/a.png"), SECOND, "leaves its folder"),
    "backslashes": (pair(image_id="images\\a.png"), SECOND, "has backslashes"),
    "a URL": (pair(image_id="https://example.org/a.png"), SECOND, "is a URL"),
    "cut base64": (pair(image_id="data:image/png;base64,AA"), SECOND, "not complete base64"),
    "control characters": (pair(image_id="images/a\n.png"), SECOND, "control characters"),
    "two images": (pair(image_id=["images/a.png"] * 2), SECOND, "2 images; keep one"),
    "an image of another type": (pair(image_id=1.5), SECOND, "an image of type float"),
    "a name too long": (pair(image_id="a" * 5000), SECOND, "longer than a file name can be"),
    "no such image": (pair(image_id="images/none.png"), SECOND, "no such image"),
    "other letters": (other_letters, SECOND, "but there is 'Cat.PNG'"),
    "a folder": (pair(image_id="images"), SECOND, "is a folder"),
    "a link out": (link, SECOND, "a link that leaves its folder"),
    "a link to itself": (looping_link, SECOND, "a link to no file"),
    # image files
    "no bytes": (image(b""), SECOND, "not a readable image"),
    "text": (image(b"no image"), SECOND, "not a readable image"),
    "a web page": (image(b"<!DOCTYPE html><html>Not found", "a.jpg"), SECOND, "not a readable"),
    "half a PNG": (image(picture()[:300]), SECOND, "truncated"),
    "half a JPEG": (image(picture("JPEG")[:-60], "a.jpg"), SECOND, "truncated"),
    "a head alone": (image(picture()[:16]), SECOND, "not a readable image"),
    "a bomb": (image(bomb()), SECOND, "bomb"),
    "an LFS pointer": (
        image(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        SECOND,
        "not a readable image",
    ),
    # Parquet and saved Hugging Face datasets
    "no Parquet": (file("data.parquet", b"no Parquet"), "data.parquet: ", "not a complete Parquet"),
    "Parquet cut off": (
        parquet([VALID_ROW], cut=40),
        "data.parquet: ",
        "not a complete Parquet file",
    ),
    "Parquet damageed": (
        parquet([VALID_ROW], damage=True),
        "data.parquet: ",
        "not a complete Parquet file",
    ),
    "Parquet without rows": (empty_parquet, "data.parquet: ", "no rows in it"),
    "Parquet without a column": (
        parquet([{k: v for k, v in VALID_ROW.items() if k != "reject"}]),
        "data.parquet, row 1: ",
        "no field 'rejected'",
    ),
    "Parquet with a null": (
        parquet([VALID_ROW, PAIR | {"question": None}]),
        "data.parquet, row 2: ",
        "no field 'question'",
    ),
    "Parquet of another type": (
        parquet([PAIR | {"chosen": 7}]),
        "data.parquet, row 1: ",
        "'chosen' is empty or not a string",
    ),
    "Parquet with a bad image": (
        parquet([{**VALID_ROW, "image_id": {"bytes": picture()[:300], "path": None}}]),
        "data.parquet, row 1: ",
        "image truncated",
    ),
    "a state that is no JSON": (
        saved(lambda folder: (folder / "state.json").write_text("{") and None),
        ": ",
        "not a complete folder of `datasets.save_to_disk`",
    ),
    "a missing part": (
        saved(lambda folder: next(folder.glob("*.arrow")).unlink()),
        ": ",
        "not a complete folder of `datasets.save_to_disk`",
    ),
    "several splits": (splits, ": ", "has the splits train, test; name one of them"),
    # LLaVA-RLHF and OpenAI's preferences
    "neither output is better": (compared(preference=0), SECOND, "'preference' is 0, not the"),
    "no preference": (compared(preference=None), SECOND, "no field 'preference'; add the number"),
    "one output": (compared(output_2={"from": "llava"}), SECOND, "'output_2' is empty"),
    "equal outputs": (compared(output_2="a"), SECOND, "chosen and rejected are the same"),
    "tools": (
        openai(input={"messages": message("What?", "user"), "tools": [{"type": "function"}]}),
        SECOND,
        "'input' contains 'tools', which is not used",
    ),
    "an input that is a text": (openai(input="What?"), SECOND, "'input' is not an object"),
    "two messages as answer": (
        openai(preferred_output=[*message("Wait.", "user"), *message("a")]),
        SECOND,
        "'preferred_output' has 2 messages; keep one",
    ),
    "a URL in a message": (openai("https://example.org/a.png"), SECOND, "is a URL, not a file"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine" / "images").mkdir(parents=True)
    (tmp_path / "mine" / "images" / "a.png").write_bytes(picture())
    return tmp_path / "mine"


@pytest.mark.parametrize("name", CASES)
def test_an_error_is_one_line_with_position_and_remedy(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, position, words = CASES[name]
    make(folder)
    assert run(app, ["data", "validate", str(folder)], name="tita") == 2
    captured = capsys.readouterr()
    lines = captured.out.splitlines() or captured.err.splitlines()
    assert len(lines) == 1, captured
    assert lines[0].removeprefix("tita: ").startswith(str(folder)), lines
    assert position in lines[0]
    assert words in lines[0]
    assert "; " in lines[0], "no remedy"
    assert "Traceback" not in captured.err


def test_there_are_at_least_fifty_cases() -> None:
    assert len(CASES) >= 50


VALID: dict[str, Case] = {
    "a byte-order mark": file("d.jsonl", b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\n"),
    "the line ends of Windows": file("d.jsonl", json.dumps(PAIR).encode() + b"\r\n\r\n"),
    "no end of the last line": file("d.jsonl", json.dumps(PAIR).encode()),
    "print in four colours": image(picture("JPEG", mode="CMYK"), "a.jpg"),
    "grey with transparency": image(picture("PNG", mode="LA")),
    "a GIF": image(picture("GIF"), "a.gif"),
    "a PNG named JPEG": image(picture(), "a.jpg"),
    "a name without ending": pair(image_id="images/a"),
    "LLaVA-RLHF's outputs": compared(),
    "OpenAI's preference": openai(),
    "no id": pair(id=...),
    "a number for an id": pair(id=7),
    "a question without an image": question(image=...),
    "Parquet": parquet([PAIR, VALID_ROW]),
}


@pytest.mark.parametrize("name", VALID)
def test_unusual_but_valid_input_is_accepted(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    VALID[name](folder)
    assert run(app, ["data", "validate", str(folder)], name="tita") == 0, capsys.readouterr()
    assert ", 0 errors" in capsys.readouterr().err


def test_all_errors_are_reported_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [PAIR, "{", {**PAIR, "id": "2", "chosen": ""}, PAIR, {**PAIR, "id": "3", "reject": " "}]
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / "1.jsonl").write_text(text)
    file("2.parquet", b"no Parquet")(folder)
    (folder / "3.jsonl").write_text(json.dumps(PAIR))
    assert run(app, ["data", "validate", str(folder), "-o", "json"], name="tita") == 2
    report = json.loads(capsys.readouterr().out)
    assert (report["num_pairs"], report["num_images"]) == (3, 1)
    assert report["num_faults"] == len(report["faults"]) == sum(report["kinds"].values()) == 5
    positions = [fault["where"].removeprefix(f"{folder}/") for fault in report["faults"]]
    assert positions == ["1.jsonl:2", "1.jsonl:3", "1.jsonl:4", "1.jsonl:5", "2.parquet"]
    assert all(fault["remedy"] for fault in report["faults"])


def test_a_missing_folder_is_a_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(app, ["data", "validate", str(tmp_path / "none")], name="tita") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no such file or folder; check the path" in line
