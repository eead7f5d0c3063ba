"""Images in base64 and `data:` URLs in the cells of tables and JSON rows, in every command."""

import base64
import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from tita.bench.suites import prepare
from tita.bench.tasks import BenchmarkTask
from tita.cli.commands import app
from tita.cli.main import run
from tita.data import open_dataset
from tita.errors import TitaError
from tita.infer.question_files import questions_of
from tita.settings import settings


def image_bytes(kind: str, *, size: int = 8, colour: str = "red") -> bytes:
    out = io.BytesIO()
    PIL.Image.new("RGB", (size, size), colour).save(out, kind)
    return out.getvalue()


def encoded(kind: str, **options: Any) -> str:
    return base64.b64encode(image_bytes(kind, **options)).decode()


KINDS = ("PNG", "JPEG", "GIF", "WEBP")
# The column of a cell, and the cell.
FORMS: dict[str, Callable[[str], str]] = {
    "data URL": lambda kind: f"data:image/{kind.lower()};base64,{encoded(kind)}",
    "base64": encoded,
    "base64 in lines": lambda kind: "\n".join(
        encoded(kind)[n : n + 76] for n in range(0, len(encoded(kind)), 76)
    ),
    "list": lambda kind: json.dumps([encoded(kind)]),
    "data URL with parameters": lambda kind: f"data:image/x;charset=utf-8;base64,{encoded(kind)}",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TITA_CACHE_DIR", str(tmp_path / "cache"))
    settings.cache_clear()
    yield
    settings.cache_clear()


def write_table(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        table = csv.DictWriter(file, rows[0], delimiter=delimiter)
        table.writeheader()
        table.writerows(rows)
    return path


def write_lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def content_of(path: Path) -> list[bytes]:
    """The images of a dataset's questions, as `build-pairs` reads them."""
    dataset = open_dataset(path)
    return [(dataset.images / str(q.image)).read_bytes() for q in dataset.questions()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_cells_of_every_form_are_the_images(form: str, suffix: str, tmp_path: Path) -> None:
    rows = [{"id": kind, "question": "What?", "image": FORMS[form](kind)} for kind in KINDS]
    write = write_lines if suffix == ".jsonl" else write_table
    path = write(tmp_path / f"q{suffix}", *rows)
    images = [image_bytes(kind) for kind in KINDS]
    assert content_of(path) == images
    assert run(app, ["data", "validate", str(path)], name="tita") == 0
    infer = questions_of(str(path), images=None)
    assert [each.images[0].read_bytes() for each in infer] == images
    with pytest.raises(TitaError, match="prepare unpack"):
        BenchmarkTask(questions=path, images=tmp_path, out=tmp_path / "out").items()
    out = tmp_path / "unpacked" / "questions.jsonl"
    assert prepare("unpack", source=path, out=out) == 4
    items = BenchmarkTask(questions=out, images=out.parent, out=tmp_path / "out").items()
    assert [(out.parent / item.images[0]).read_bytes() for item in items] == images


def test_pairs_in_a_table_are_read_with_their_images(tmp_path: Path) -> None:
    row = {"question": "What?", "chosen": "a", "rejected": "b", "image": encoded("PNG")}
    dataset = open_dataset(write_table(tmp_path / "pairs.csv", row))
    (pair,) = dataset.pairs()
    assert (dataset.images / pair.image).read_bytes() == image_bytes("PNG")
    assert pair.image.endswith(f"{hashlib.sha256(image_bytes('PNG')).hexdigest()}.png")


def test_rows_with_files_and_with_embedded_images_may_be_mixed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image_bytes("PNG", colour="blue"))
    path = write_table(
        tmp_path / "q.tsv",
        {"question": "1?", "image": "a.png"},
        {"question": "2?", "image": f"data:image/png;base64,{encoded('PNG')}"},
    )
    assert content_of(path) == [image_bytes("PNG", colour="blue"), image_bytes("PNG")]


def test_images_inside_of_messages_and_objects(tmp_path: Path) -> None:
    url = f"data:image/jpeg;base64,{encoded('JPEG')}"
    part = {"type": "image_url", "image_url": {"url": url}}
    message = {"role": "user", "content": [part, {"type": "text", "text": "What?"}]}
    stored = {"bytes": encoded("JPEG"), "path": None}
    path = write_lines(
        tmp_path / "q.jsonl",
        {"id": "1", "messages": [message]},
        {"id": "2", "question": "What?", "image": stored},
        {"id": "3", "question": "What?", "images": [url]},
    )
    assert content_of(path) == [image_bytes("JPEG")] * 3


def test_standard_input_may_embed_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps({"question": "What?", "image": encoded("PNG")}).encode() + b"\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(line)))
    (question,) = questions_of("-", images=None)
    assert question.images[0].read_bytes() == image_bytes("PNG")


LARGE = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 400).decode()


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        # Excel keeps 32,767 characters of a cell.
        (LARGE[:32_767], "not complete base64; write the whole file, or its path; Excel cuts"),
        ("data:image/png;base64,iVBORw0KGgo*", "not complete base64"),
        ("data:image/png;base64,", "not complete base64"),
        ("data:text/html;base64,aGk=", "is no image in base64"),
        ("data:image/svg+xml,%3Csvg%3E", "is no image in base64"),
        (base64.b64encode(b"GIF89a" + bytes(90)).decode(), "image not a readable image"),
        (LARGE[:32_764], "image not a readable image"),
        (base64.b64encode(bytes(600)).decode(), "or data:image/...;base64,..."),
    ],
)
def test_what_is_no_image_is_refused_with_its_line(
    cell: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_table(tmp_path / "q.csv", {"question": "What?", "image": cell})
    assert run(app, ["data", "validate", str(path)], name="tita") == 2
    said = capsys.readouterr()
    assert f"{path}:2: " in said.out + said.err
    assert message in said.out + said.err


def test_names_that_look_like_base64_are_paths(tmp_path: Path) -> None:
    for name in ("R0lGOD.png", "UklGRa/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(image_bytes("PNG"))
        path = write_table(tmp_path / "q.csv", {"question": "What?", "image": name})
        assert content_of(path) == [image_bytes("PNG")]
