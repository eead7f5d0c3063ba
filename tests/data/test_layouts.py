"""Every layout in `tests/data/layouts` gives the records beside it, in all five commands.

Each folder holds the rows as their publishers write them, and `records.json`, written by hand.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tita.bench.questions import BenchmarkItem
from tita.bench.suites import prepare
from tita.bench.tasks import BenchmarkTask
from tita.cli.commands import app
from tita.cli.main import run
from tita.data import write_pairs
from tita.data.image_table import image_sha256
from tita.demo.models import demo_model_path
from tita.errors import TitaError
from tita.infer.question_files import questions_of
from tita.pairs.build import prepare_run
from tita.recipes import PairsRecipe, TrainRecipe
from tita.records import ContextTurn, Pair
from tita.settings import settings
from tita.storage import Store, open_store
from tita.train.training_data import read_inputs

LAYOUTS = Path(__file__).parent / "layouts"
IMAGES = LAYOUTS / "images"
NAMES = sorted(path.parent.name for path in LAYOUTS.glob("*/records.json"))


def rows_of(name: str) -> Path:
    (path,) = (LAYOUTS / name).glob("rows.*")
    return path


def wanted(name: str) -> tuple[str, list[dict[str, Any]]]:
    """Name of the layout, and its records with the digests of their images."""
    found = json.loads((LAYOUTS / name / "records.json").read_text())
    records = [each | {"image": digest(IMAGES / each["image"])} for each in found["records"]]
    return found["layout"], records


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def as_lists(context: Iterable[ContextTurn]) -> list[list[Any]]:
    return [[turn.role, turn.text, turn.num_images] for turn in context]


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("TITA_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("TITA_CACHE_DIR", str(tmp_path / "cache"))
    settings.cache_clear()
    return open_store()


def train_dpo(path: Path, store: Store, tmp_path: Path) -> list[dict[str, Any]]:
    recipe = TrainRecipe(model=str(demo_model_path("reward")), pairs=str(path), images=str(IMAGES))
    inputs = read_inputs(recipe, store=store)
    return [
        {
            "id": pair.id,
            "context": as_lists(pair.context),
            "question": pair.question,
            "image": image_sha256(inputs.images, pair.image),
            "chosen": pair.chosen,
            "rejected": pair.rejected,
        }
        for pair in inputs.pairs
    ]


def build_pairs(path: Path, store: Store, tmp_path: Path) -> list[dict[str, Any]]:
    recipe = PairsRecipe(questions=str(path), images=str(IMAGES))
    prepared = prepare_run(recipe, name="x", store=store)
    return [
        {
            "id": question.id,
            "context": as_lists(question.context),
            "question": question.text,
            "image": image_sha256(prepared.images, str(question.image)),
            "references": list(question.references),
        }
        for question in prepared.questions
    ]


def infer(path: Path, store: Store, tmp_path: Path) -> list[dict[str, Any]]:
    return [
        {
            "id": str(question.id),
            "context": as_lists(question.context),
            "question": question.text,
            "image": digest(question.images[0]),
        }
        for question in questions_of(str(path), images=IMAGES)
    ]


def bench_record(item: BenchmarkItem, images: Path) -> dict[str, Any]:
    choices = {"choices": list(item.choices)} if item.choices else {}
    return {
        "id": item.id,
        "context": as_lists(item.context),
        "question": item.text,
        "image": digest(images / item.images[0]),
        "references": list(item.references),
        **choices,
    }


def tita_bench(path: Path, store: Store, tmp_path: Path) -> list[dict[str, Any]]:
    """Rows with images in them are unpacked first, as the error says."""
    questions, images = path, IMAGES
    if path.parent.name in ("lmms_lab", "mmmu", "openai_preference", "rlaif_v", "rlhf_v"):
        with pytest.raises(TitaError, match="tita-bench prepare unpack"):
            BenchmarkTask(questions=path, images=IMAGES, out=tmp_path / "out").items()
        questions, images = tmp_path / "unpacked" / "questions.jsonl", tmp_path / "unpacked"
        prepare("unpack", source=path, out=questions)
    items = BenchmarkTask(questions=questions, images=images, out=tmp_path / "out").items()
    return [bench_record(item, images) for item in items]


COMMANDS: dict[str, Callable[[Path, Store, Path], list[dict[str, Any]]]] = {
    "train-dpo": train_dpo,
    "build-pairs": build_pairs,
    "infer": infer,
    "tita-bench": tita_bench,
}


def test_there_is_a_layout_for_every_row_of_the_table() -> None:
    from tita.data.layouts import LAYOUTS as TABLE

    assert {layout.name for layout in TABLE} == {wanted(name)[0] for name in NAMES}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_command_reads_the_same_records(
    name: str,
    command: str,
    store: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layout, records = wanted(name)
    are_pairs = "chosen" in records[0]
    path = rows_of(name)
    if command == "train-dpo" and not are_pairs:
        with pytest.raises(TitaError, match="a question, not a pair: no field 'chosen'"):
            train_dpo(path, store, tmp_path)
        return
    found = COMMANDS[command](path, store, tmp_path)
    assert len(found) == len(records)
    for one, record in zip(found, records, strict=True):
        # A command reads what it needs; a pair's answers are no references.
        expected = {"references": [], **record}
        assert one == {key: expected[key] for key in one}
    assert {"id", "context", "question", "image"} <= found[0].keys()
    if command != "tita-bench":
        kind = "pair" if are_pairs else "question"
        plural = "" if len(records) == 1 else "s"
        said = f"{path.name}: {layout} layout, {len(records)} {kind}{plural}"
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_validate_accepts_and_names_every_layout(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    layout, records = wanted(name)
    path = rows_of(name)
    command = ["data", "validate", str(path), "--images", str(IMAGES)]
    assert run(app, command, name="tita") == 0, capsys.readouterr().out
    kind = "pair" if "chosen" in records[0] else "question"
    plural = "" if len(records) == 1 else "s"
    assert f"{path}: {layout} layout, {len(records)} {kind}{plural}" in capsys.readouterr().err


def test_pairs_that_are_written_here_are_named_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MMPR has the same columns."""
    pair = Pair(id="a", image="0.png", question="What?", chosen="red", rejected="green")
    (tmp_path / "p.jsonl").write_bytes(write_pairs([pair]))
    command = ["data", "validate", str(tmp_path / "p.jsonl"), "--images", str(IMAGES)]
    assert run(app, command, name="tita") == 0
    assert "p.jsonl: pair layout, 1 pair" in capsys.readouterr().err


def test_validate_names_the_layout_of_every_file_of_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in NAMES:
        (tmp_path / name).mkdir()
        shutil.copy(rows_of(name), tmp_path / name)
    shutil.copytree(IMAGES, tmp_path / "images")
    command = ["data", "validate", str(tmp_path)]
    assert run(app, [*command, "-o", "json"], name="tita") == 0
    layouts = json.loads(capsys.readouterr().out)["layouts"]
    named = {Path(file).parent.name: text.split(" layout, ")[0] for file, text in layouts.items()}
    read = {name for name in NAMES if rows_of(name).suffix in (".jsonl", ".parquet")}
    assert named == {name: wanted(name)[0] for name in read}
    assert run(app, command, name="tita") == 0
    said = capsys.readouterr().err
    for name in NAMES:
        line = next(line for line in said.splitlines() if f"/{name}/rows." in line)
        if name in read:
            assert f": {wanted(name)[0]} layout, " in line
        else:
            assert line.endswith(": not read as part of a folder; give the file itself")


def test_a_run_without_images_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"id": 1, "text": "a"}\n{"id": 2, "text": "b"}\n')
    assert all(not question.images for question in questions_of(str(path), images=None))
    assert "q.jsonl: question layout, 2 questions, no images" in capsys.readouterr().err
    BenchmarkTask(questions=path, images=tmp_path, out=tmp_path / "out").items()
    assert "q.jsonl: question layout, 2 questions, no images" in capsys.readouterr().err
    path.write_text('{"id": 1, "text": "a"}\n{"id": 2, "text": "b", "image": "0.png"}\n')
    assert run(app, ["data", "validate", str(path), "--images", str(IMAGES)], name="tita") == 0
    assert "2 questions, 1 without an image" in capsys.readouterr().err
