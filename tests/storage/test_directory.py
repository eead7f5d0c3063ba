"""Directory store: killed pushes, and readers during a push."""

import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tita.errors import TitaError
from tita.storage import directory_push, manifest, open_store
from tita.storage.manifest import ManifestFile

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
    """Two trees with the same names, different content, and one file that only one of them has."""
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
        if path.is_file()
        and path.name != "manifest.json"
        and ".tita-" not in str(path.relative_to(root))
    }


def test_killed_push_leaves_one_complete_tree_or_none(folders: list[Path], tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    trees = [content(folder) for folder in folders]
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
            assert content(pulled) in trees
    store.push_tree(folders[0], "data")
    assert content(store.pull_tree("data", into=tmp_path / "last")) == trees[0]


ONCE = PUSHING.replace("while True:", "if True:")


def stages(store: Path) -> set[Path]:
    return {path for path in store.glob("data/.tita-stage-*") if path.is_dir()}


@pytest.fixture
def started() -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Processes that are killed at the end of the test, even if they were stopped."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def push_and_stop(
    folder: Path, store: Path, started: list["subprocess.Popen[bytes]"]
) -> "subprocess.Popen[bytes]":
    """A process that was stopped while its staging folder has copies of files."""
    before = stages(store)

    def is_staging() -> bool:
        return any((path / "5").exists() for path in stages(store) - before)

    while True:
        process = subprocess.Popen([sys.executable, "-c", ONCE, store, folder])
        started.append(process)
        while process.poll() is None:
            if is_staging():
                process.send_signal(signal.SIGSTOP)
                if is_staging():
                    return process
                process.send_signal(signal.SIGCONT)


def test_push_removes_staging_folders_of_killed_processes_only(
    tmp_path: Path, started: list["subprocess.Popen[bytes]"]
) -> None:
    store, folder, other = tmp_path / "store", tmp_path / "tree", tmp_path / "other"
    for root in (folder, other):
        root.mkdir()
        for number in range(400):
            (root / f"{number:03}").write_bytes(root.name.encode() * 5_000)
    killed = push_and_stop(folder, store, started)
    (dead,) = stages(store)
    living = push_and_stop(other, store, started)
    (alive,) = stages(store) - {dead}
    copies = set(alive.iterdir())
    killed.kill()
    killed.wait()
    assert dead.exists()
    opened = open_store(str(store))
    opened.push_tree(folder, "data")
    assert not dead.exists()
    assert set(alive.iterdir()) == copies
    assert content(opened.pull_tree("data", into=tmp_path / "copy")) == content(folder)
    assert {info.key.rpartition("/")[0] for info in opened.list()} == {"data"}
    living.send_signal(signal.SIGCONT)
    # The other push has won.
    assert living.wait() == 1
    assert content(opened.pull_tree("data")) == content(folder)
    assert not list(store.glob("data/.tita-*"))


def test_damaged_tree_is_not_read_again(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path / "store"))
    store.push_tree(folders[0], "data")
    (tmp_path / "store" / "data" / "below" / "7").write_text("b" * 1007)
    copied: list[str] = []
    copyfile = shutil.copyfile

    def watch(source: Path, target: Path) -> Path:
        copied.append(source.name)
        return copyfile(source, target)

    monkeypatch.setattr("shutil.copyfile", watch)
    with pytest.raises(TitaError, match=r"below/7: does not match its manifest; push the"):
        store.pull_tree("data", into=tmp_path / "copy")
    assert copied.count("7") == 1
    assert content(tmp_path / "copy") == {}


def test_file_may_become_a_folder_and_back(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    for number, path in enumerate(("name", "name/deep/er", "name")):
        file = tmp_path / str(number) / path
        file.parent.mkdir(parents=True)
        file.write_text(path)
        store.push_tree(tmp_path / str(number), "data")
        assert content(store.pull_tree("data")) == {path: path.encode()}


def test_readers_find_a_complete_tree_during_pushes(folders: list[Path], tmp_path: Path) -> None:
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


def test_push_copies_what_a_prune_removes_meanwhile(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path / "store"))
    store.push_tree(folders[0], "data")
    is_complete = directory_push.is_complete

    def remove_then(path: Path, file: ManifestFile) -> bool:
        found = is_complete(path, file)
        if found and path.is_relative_to(tmp_path / "store" / "data") and path.name == "3":
            path.unlink()
        return found

    (folders[0] / "a").write_text("changed")
    monkeypatch.setattr(directory_push, "is_complete", remove_then)
    store.push_tree(folders[0], "data")
    assert content(store.pull_tree("data")) == content(folders[0])


def test_file_that_is_removed_while_it_is_checked_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"a")
    file = ManifestFile(path="a", size_bytes=1, sha256=manifest.sha256_of(path))
    assert manifest.is_complete(path, file)
    sha256_of = manifest.sha256_of

    def remove_first(path: Path) -> str:
        path.unlink()
        return sha256_of(path)

    monkeypatch.setattr(manifest, "sha256_of", remove_first)
    assert not manifest.is_complete(path, file)


@pytest.mark.parametrize("num_others", [0, 100])
def test_link_in_a_tree_that_was_pushed_in_place_keeps_its_content(
    tmp_path: Path, num_others: int
) -> None:
    store = open_store(str(tmp_path / "store"))
    place = tmp_path / "store" / "data"
    place.mkdir(parents=True)
    (place / "image.jpg").write_text("first")
    (place / "same.jpg").symlink_to("image.jpg")
    store.push_tree(place, "data")
    other = tmp_path / "other"
    other.mkdir()
    (other / "image.jpg").write_text("second")
    (other / "same.jpg").write_text("first")
    for number in range(num_others):  # many files are not opened one by one
        (other / f"{number}").write_text(f"{number}")
    store.push_tree(other, "data")
    assert (store.pull_tree("data") / "same.jpg").read_text() == "first"
    assert content(store.pull_tree("data", into=tmp_path / "copy")) == content(other)
