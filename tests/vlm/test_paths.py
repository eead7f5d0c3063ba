"""What takes a path takes `str` and `Path`, with the same result."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest

from tita.align import Engine, Guidance, Request
from tita.data import open_dataset, read_pairs, read_questions, write_pairs
from tita.demo.models import demo_model_path
from tita.errors import TitaError
from tita.records import Pair
from tita.report import Page
from tita.storage import open_store, resolve
from tita.vlm.images import open_image
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
