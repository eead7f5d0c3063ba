"""What takes a path takes `str` and `Path`, with the same result."""

import importlib
import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from tita.align import Engine, Guidance, Request
from tita.data import Dataset, open_dataset, read_pairs, read_questions, validate, write_pairs
from tita.data.validate import ValidationSummary, validate_dataset
from tita.demo.models import demo_model_path
from tita.errors import TitaError
from tita.records import Pair
from tita.report import Card, Page, Panel, SideBySide
from tita.storage import open_store, resolve
from tita.vlm import images, loading, processors
from tita.vlm.images import open_image, write_aspect
from tita.vlm.loading import Models, load_vlm, locate_model, model_digest
from tita.vlm.processors import load_processor

Kind = Callable[[Path], str | Path]

kinds = pytest.mark.parametrize("kind", [str, Path])


@kinds
def test_models_and_images(kind: Kind, tmp_path: Path) -> None:
    folder = demo_model_path("base")
    assert locate_model(kind(folder)) == str(folder)
    assert load_processor(kind(folder), where="base").chat_template
    vlm = load_vlm(kind(folder))
    assert vlm.name == str(folder)
    assert model_digest(vlm) == model_digest(load_vlm(str(folder)))
    image = PIL.Image.effect_noise((40, 40), 50).convert("RGB")
    image.save(tmp_path / "a.png")
    assert open_image(kind(tmp_path / "a.png")).tobytes() == image.tobytes()
    given = [
        Request(question="what", images=images, reward_images=images, guidance=Guidance(weight=0.0))
        for images in ((kind(tmp_path / "a.png"),), (image,))
    ]
    one, other = Engine(Models(vlm)).generate(given)
    assert one == other
    with pytest.raises(TitaError, match="no such image"):
        Engine(Models(vlm)).generate([Request(images=(kind(tmp_path / "b.png"),))])


def test_a_path_is_local_whatever_the_store_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`models/base` as text is first a tree in the store; as a `Path` it is a folder here."""
    store = open_store(tmp_path / "store")
    store.push_tree(demo_model_path("reward"), "models/base")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo_model_path("base"), "models/base")
    reward, base = demo_model_path("reward"), demo_model_path("base")
    text, path = (load_vlm(each, store=store) for each in ("models/base", Path("models/base")))
    assert model_digest(text, store=store) == model_digest(load_vlm(reward))
    assert model_digest(path, store=store) == model_digest(load_vlm(base))
    assert resolve(Path("models"), store=store) == Path("models")
    for missing in (Path("models/none"), Path("org/model")):
        with pytest.raises(TitaError, match="no such file or folder"):
            load_vlm(missing, store=store)
    assert os.path.samefile(resolve(Path("../") / tmp_path.name, store=store), tmp_path)


@kinds
def test_stores_datasets_and_pages(kind: Kind, tmp_path: Path) -> None:
    pair = Pair(id="1", image="a.png", question="what", chosen="yes", rejected="no")
    data = tmp_path / "data"
    data.mkdir()
    (data / "pairs.jsonl").write_bytes(write_pairs([pair]))
    PIL.Image.new("RGB", (8, 8)).save(data / "a.png")
    file = data / "pairs.jsonl"
    assert list(read_pairs(kind(file))) == list(open_dataset(kind(file)).pairs()) == [pair]
    assert open_dataset(kind(file), images=kind(tmp_path)).images == tmp_path
    assert [each.text for each in read_questions(kind(file))] == ["what"]
    store = open_store(kind(tmp_path / "store"))
    store.push_tree(kind(data), "data/a")
    assert sorted(os.listdir(store.pull_tree("data/a", into=kind(tmp_path / "out")))) == [
        ".tita-pulled.json", "a.png", "pairs.jsonl",
    ]  # fmt: skip
    page = Page("title")
    page.write(kind(tmp_path / "page.html"))
    assert "title" in (tmp_path / "page.html").read_text()


@kinds
def test_aspects_and_validation(kind: Kind, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo_model_path("reward"), folder)
    write_aspect(kind(folder), "pad")
    assert json.loads((folder / "config.json").read_text())["image_aspect_ratio"] == "pad"
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    pair = Pair(id="1", image="a.png", question="what", chosen="yes", rejected="no")
    (tmp_path / "pairs.jsonl").write_bytes(write_pairs([pair]))
    summary = ValidationSummary()
    found = validate_dataset(kind(tmp_path / "pairs.jsonl"), images=kind(tmp_path), summary=summary)
    assert (list(found), summary.num_pairs, summary.num_images) == ([], 1, 1)


@kinds
def test_pictures_on_pages(kind: Kind, tmp_path: Path) -> None:
    PIL.Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    image = kind(tmp_path / "a.png")
    page = Page("title")
    page.gallery([Card(title="card", image=image)])
    panel = Panel(label="chosen", text="yes", image=image)
    page.side_by_side([SideBySide(title="sides", panels=(panel,))])
    page.write(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("data:image/png;base64,") == 2


_DOCS = Path(__file__).parent.parent.parent / "docs"
_RESULTS = {Dataset}
"""Types that callers get and do not make."""


def public_objects() -> dict[str, Any]:
    """What Python callers use: exports of packages, names in docs, and what loads models."""
    found: dict[str, Any] = {}
    for name in ("align", "data", "report", "storage", "vlm"):
        package = importlib.import_module(f"tita.{name}")
        for export in getattr(package, "__all__", ()):
            found[f"tita.{name}.{export}"] = getattr(package, export)
    for text in (file.read_text() for file in _DOCS.glob("*.md")):
        for module, names in re.findall(r"^\s*from (tita[\w.]*) import ([\w, ]+)$", text, re.M):
            for name in names.split(", "):
                found[f"{module}.{name}"] = getattr(importlib.import_module(module), name)
    for module in (images, loading, processors, validate):
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_":
                found[f"{module.__name__}.{name}"] = value
    return {name: each for name, each in found.items() if callable(each) and each not in _RESULTS}


def paths_of(thing: Any) -> Iterator[tuple[str, str]]:
    """Parameters of a function, or of a class's constructor and public methods, that are paths."""
    named = vars(thing).items() if inspect.isclass(thing) else ()
    methods = [m for name, m in named if inspect.isfunction(m) and name[0] != "_"]
    for function in (thing, *methods):
        for parameter in inspect.signature(function).parameters.values():
            kind = parameter.annotation
            text = kind.__name__ if isinstance(kind, type) else str(kind)
            if re.search(r"\bPath\b", text):
                yield f"{function.__qualname__}({parameter.name})", text


def test_public_functions_take_either() -> None:
    found = public_objects()
    assert {"tita.vlm.loading.load_vlm", "tita.align.Request"} <= found.keys()
    paths = [path for thing in found.values() for path in paths_of(thing)]
    assert {"open_dataset(images)", "load_vlm(where)", "Store.push_tree(folder)"} <= dict(
        paths
    ).keys()
    assert [f"{name}: {text}" for name, text in paths if not re.search(r"\bstr\b", text)] == []
