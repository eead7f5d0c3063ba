"""A store with the scenes of the demo."""

import os
from pathlib import Path

import pytest

from tita.demo.scenes import make_scenes, write_scenes
from tita.settings import settings
from tita.storage import Store, open_store

NUM_SCENES = 10


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, make_scenes("train", number=NUM_SCENES), name="train")
    return folder


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of this process and its workers, with a directory as the store."""
    monkeypatch.setenv("TITA_STORE", str(tmp_path / "store"))
    return dict(os.environ)


@pytest.fixture
def store(environment: dict[str, str], scenes: Path) -> Store:
    """The store with the scenes as its tree `data`."""
    settings.cache_clear()
    store = open_store()
    store.push_tree(scenes, "data")
    return store
