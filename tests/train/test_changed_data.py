"""A run resumes over the inputs that it was started with, and its nodes read one version."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.train.test_checkpoints import save
from tita.demo.models import demo_model_path
from tita.errors import ExitCode, TitaError
from tita.recipes import TrainRecipe, validate_recipe
from tita.settings import settings
from tita.storage import open_store
from tita.storage.manifest import sha256_of
from tita.train.preflight import _read_versions, check_equal_versions
from tita.train.run import TrainRun
from tita.train.training import identify_data
from tita.train.training_data import (
    TrainInputs,
    data_identity,
    input_places,
    read_inputs,
    start_model_digest,
)

PLACES = {
    "model": "model",
    "pairs": "set/pairs.jsonl",
    "images": "set/images",
    "validation": "set/held.jsonl",
    "sft.answers": "set/answers.jsonl",
}


@pytest.fixture
def root(data: Any, tmp_path: Path) -> Path:
    """A folder with all inputs of a run."""
    shutil.copytree(data.images, tmp_path / "set/images")
    shutil.copytree(demo_model_path("reward"), tmp_path / "model")
    rows = [json.loads(line) for line in data.pairs.read_text().splitlines()]
    for name in ("pairs", "held"):
        write_rows(tmp_path / f"set/{name}.jsonl", rows)
    answers = [
        {"id": row["id"], "image": row["image_id"], "question": row["question"], "answer": "yes"}
        for row in rows
    ]
    write_rows(tmp_path / "set/answers.jsonl", answers)
    return tmp_path


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def recipe_of(places: dict[str, str], **changes: Any) -> TrainRecipe:
    given = dict(places)
    sft = {"steps": 2, "answers": given.pop("sft.answers")}
    return validate_recipe(TrainRecipe, given | {"sft": sft, "dtype": "float32"} | changes)


def begin(root: Path, *, store: str = "store", **changes: Any) -> TrainRun:
    """A start of the run, up to the check of its data."""
    start_model_digest.cache_clear()
    recipe = recipe_of({name: str(root / place) for name, place in PLACES.items()}, **changes)
    opened = open_store(root / store)
    run = TrainRun(recipe=recipe, name="a", out="runs/a", folder=root / "work", store=opened)
    return identify_data(run, with_digests(read_inputs(recipe, store=opened)))


def with_digests(inputs: TrainInputs) -> TrainInputs:
    folder = inputs.images.folder  # type: ignore[union-attr]
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.png")}
    return replace(inputs, image_digests={name: sha256_of(paths[name]) for name in paths})


def edit_row(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0].replace("?", "!"), *lines[1:]]))


def reorder(path: Path) -> None:
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))


def repaint(folder: Path) -> None:
    path = min(folder.rglob("*.png"))
    Image.new("RGB", Image.open(path).size, "red").save(path)


def retrain(folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("pairs", edit_row),
        ("pairs", reorder),
        ("images", repaint),
        ("validation", edit_row),
        ("sft.answers", edit_row),
        ("model", retrain),
    ],
)
@pytest.mark.parametrize("stage", ["DPO", "warm-up"])
def test_a_run_does_not_resume_over_other_inputs(
    root: Path, lone_rank: None, name: str, change: Callable[[Path], None], stage: str
) -> None:
    run = begin(root)
    saved = run if stage == "DPO" else run.warm_up_stage()
    save(saved.checkpoints(), step=4, folder=root / "saved")
    assert begin(root).data == run.data
    place = root / PLACES[name]
    former = root / "former"
    (shutil.copytree if place.is_dir() else shutil.copyfile)(place, former)
    change(place)
    with pytest.raises(TitaError) as refused:
        begin(root)
    assert refused.value.exit_code == ExitCode.USER
    said = str(refused.value)
    assert f"since checkpoint 4 was saved: {name} ({place});" in said
    assert said.startswith(f"{saved.out}: inputs have changed")
    assert saved.checkpoints().complete() == [4]
    # Another run name or recipe starts at step 0.
    assert begin(root, beta=0.3).data != run.data
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    former.rename(place)
    assert begin(root).data == run.data


def test_checkpoints_of_earlier_versions_and_damaged_ones_do_not_count(
    root: Path, lone_rank: None
) -> None:
    run = begin(root)
    for step in (2, 4):
        save(run.checkpoints(), step=step, folder=root / "saved")
    newest, before = (root / f"store/runs/a/checkpoints/{n}/node-0/manifest.json" for n in (4, 2))
    newest.write_text("{}")
    edit_row(root / "set/pairs.jsonl")
    with pytest.raises(TitaError, match="since checkpoint 2 was saved"):
        begin(root)
    manifest = json.loads(before.read_text())
    recorded = manifest["meta"].pop("data")
    before.write_text(json.dumps(manifest))
    assert begin(root).checkpoints().restore(root / "here") == root / "here/checkpoint-2"
    manifest["meta"]["data"] = recorded | {"version": "0"}
    before.write_text(json.dumps(manifest))
    begin(root)


def test_the_identity_is_that_of_the_content(
    root: Path, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of its place, of files beside it, nor of the node's cache."""
    found = []
    for number, uri in enumerate([str(root / "store"), s3_environment["TITA_STORE"]]):
        monkeypatch.setenv("TITA_CACHE_DIR", str(root / f"cache-{number}"))
        settings.cache_clear()
        store = open_store(uri)
        (root / "set/README.md").write_text(uri)
        for tree in ("set", "model"):
            store.push_tree(root / tree, tree)
        recipe = recipe_of(PLACES)
        inputs = with_digests(read_inputs(recipe, store=store))
        found.append(data_identity(inputs, recipe=recipe))
    assert found[0] == found[1]
    assert set(found[0]) == {*PLACES, "version"}


def test_a_new_way_to_compute_the_identity_needs_a_new_version(tmp_path: Path) -> None:
    """Otherwise a run that is resumed after an upgrade would be refused.

    Increase `_IDENTITY_VERSION` together with the digest here.
    """
    rows = [{"id": "1", "image": "1.png", "question": "a?", "chosen": "b", "rejected": "c"}]
    write_rows(tmp_path / "pairs.jsonl", rows)
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    places = {"model": str(demo_model_path("reward")), "pairs": str(tmp_path / "pairs.jsonl")}
    recipe = validate_recipe(TrainRecipe, places)
    inputs = read_inputs(recipe, store=open_store(tmp_path / "store"))
    inputs = replace(inputs, image_digests={"1.png": "0" * 64})
    found = data_identity(inputs, recipe=recipe)
    short = {name: value[:16] for name, value in found.items() if name != "model"}
    assert short == {"version": "1", "pairs": "94cea79022d68769", "images": "877c81aebb30967c"}


def test_nodes_that_pull_another_version_are_refused(
    root: Path, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tree that is pushed again between the pulls of two nodes."""
    store = open_store(s3_environment["TITA_STORE"])
    for tree in ("set", "model"):
        store.push_tree(root / tree, tree)
    recipe = recipe_of(PLACES)

    def pull(node: int) -> dict[str, str | None]:
        monkeypatch.setenv("TITA_CACHE_DIR", str(root / f"node-{node}"))
        settings.cache_clear()
        return _read_versions(read_inputs(recipe, store=store), recipe=recipe)

    first, places = pull(0), input_places(recipe)
    assert None not in first.values()
    check_equal_versions([first, pull(1)], places=places)
    for name, change in (("images", repaint), ("model", retrain)):
        change(root / PLACES[name])
        store.push_tree(root / PLACES[name].partition("/")[0], PLACES[name].partition("/")[0])
        with pytest.raises(TitaError, match=f"{name}: rank 1 has read another version of {name}"):
            check_equal_versions([first, pull(2)], places=places)
        first = pull(3)
