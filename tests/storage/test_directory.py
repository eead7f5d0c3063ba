"""A directory's trees survive pushes that are killed, and are there while they are replaced."""

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tita.storage import open_store

PUSHING = """
import sys
from pathlib import Path
from tita.storage import open_store
store = open_store(sys.argv[1])
print("begun", flush=True)
while True:
    for folder in sys.argv[2:]:
        store.push_tree(Path(folder), "data")
"""


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two trees with the same names and other content, and one file that only one has."""
    found = []
    for letter in "ab":
        folder = tmp_path / letter
        (folder / "below").mkdir(parents=True)
        for number in range(20):
            (folder / "below" / f"{number}").write_text(letter * (1000 + number))
        (folder / letter).write_text(letter)
        found.append(folder)
    return found


def content(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != "manifest.json" and not path.name.startswith(".tita-")
    }


def test_a_killed_push_leaves_one_tree_or_none(folders: list[Path], tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    whole = [content(folder) for folder in folders]
    for number in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", PUSHING, store.uri, *map(str, folders)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(random.Random(number).uniform(0, 0.3))
        process.kill()
        process.communicate()
        if store.read_manifest("data") is not None:
            pulled = store.pull_tree("data", into=tmp_path / f"copy{number}")
            assert content(pulled) in whole
    store.push_tree(folders[0], "data")
    assert content(store.pull_tree("data", into=tmp_path / "last")) == whole[0]


def test_readers_always_find_a_whole_tree(folders: list[Path], tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    store.push_tree(folders[1], "data")
    stop = threading.Event()

    def push() -> None:
        while not stop.is_set():
            for folder in folders:
                store.push_tree(folder, "data")

    pushing = threading.Thread(target=push)
    pushing.start()
    try:
        for number in range(30):
            pulled = store.pull_tree("data", into=tmp_path / f"copy{number}")
            assert content(pulled) in [content(folder) for folder in folders]
    finally:
        stop.set()
        pushing.join()
