"""Random schedules of two writers, a reader, a prune and kills never tear or lose a tree."""

import os
import random
import shutil
import signal
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest

from tests.storage_writer import start_push
from tita.errors import ExitCode, TitaError
from tita.storage import Store, open_store
from tita.storage.directory import DirectoryStore
from tita.storage.s3_store import S3Store

ENV = ("AWS_", "TITA_")
ROUNDS = 3
NAMES = ("a", "b", "deep/c", "deep/d", "e/manifest.json", "f")
SOON_S = 0.25


def make_version(folder: Path, dice: random.Random, *, number: int) -> dict[str, bytes]:
    """A folder whose files tell their version; some files are the same in all versions."""
    files = {"same": b"same", f"only-{number}": b"only"}
    for name in dice.sample(NAMES, 4):
        files[name] = f"{name} of version {number}".encode() * dice.choice((1, 500, 5000))
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return files


def content(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and ".tita-" not in path.relative_to(root).as_posix()
    }


class Reader(threading.Thread):
    """Pulls the tree again and again, and keeps what it saw."""

    def __init__(self, store: Store, name: str, scratch: Path) -> None:
        super().__init__(daemon=True)
        self.store, self.name_of_tree, self.scratch = store, name, scratch
        self.stopped = threading.Event()
        self.seen: list[dict[str, bytes]] = []
        self.errors: list[str] = []

    def run(self) -> None:
        while not self.stopped.is_set():
            try:
                path = self.store.pull_tree(self.name_of_tree, into=self.scratch)
                self.seen.append(content(path))
            except TitaError as error:
                if "no complete tree" not in str(error):
                    self.errors.append(str(error))
            shutil.rmtree(self.scratch, ignore_errors=True)


def one_schedule(store: Store, seed: int, tmp_path: Path) -> None:
    dice, tree = random.Random(seed), f"data/{seed}"
    env = {name: value for name, value in os.environ.items() if name.startswith(ENV)}
    versions: dict[int, dict[str, bytes]] = {}
    possible: list[dict[str, bytes] | None] = [None]
    here = tmp_path / str(seed)
    for round_ in range(ROUNDS):
        reader = Reader(store, tree, here / "read")
        reader.start()
        writers = []
        for number in (2 * round_, 2 * round_ + 1):
            folder = here / str(number)
            versions[number] = make_version(folder, dice, number=number)
            time.sleep(dice.choice((0, 0.02, 0.1)))
            process = start_push(store.uri, folder, tree, env=env)
            fault = threading.Thread(
                target=disturb, args=(process.pid, dice.random(), dice.random())
            )
            fault.start()
            writers.append((number, process, fault))
        if possible != [None] and dice.random() < 0.5:
            time.sleep(dice.uniform(0, SOON_S))
            store.prune("data/", older_than=timedelta(0))
        for _, process, fault in writers:
            fault.join()
            process.join()
        reader.stopped.set()
        reader.join()
        assert reader.errors == []
        known = [*versions.values()]
        assert all(seen in known for seen in reader.seen), "a mixture was read"
        codes = {number: process.exitcode for number, process, _ in writers}
        assert set(codes.values()) <= {0, ExitCode.CONFLICT, -signal.SIGKILL}, codes
        done = [versions[number] for number, code in codes.items() if code == 0]
        killed = [versions[number] for number, code in codes.items() if code == -signal.SIGKILL]
        # A killed push may have been complete, before or after another one.
        possible = [*done, *killed] if done else [*killed, *possible]
        now = read(store, tree, here / "now")
        assert now in possible, f"round {round_}: {codes}"
        possible = [now]
    last = make_version(here / "last", dice, number=99)
    store.push_tree(here / "last", tree)
    store.prune(tree, older_than=timedelta(0))
    assert read(store, tree, here / "now") == last
    assert_nothing_is_left(store, tree)
    shutil.rmtree(here)


def disturb(pid: int | None, what: float, when: float) -> None:
    assert pid is not None
    time.sleep(when * SOON_S)
    with suppress(ProcessLookupError):
        if what < 0.4:
            os.kill(pid, signal.SIGKILL)
        elif what < 0.7:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(2 * SOON_S)
            os.kill(pid, signal.SIGCONT)


def read(store: Store, tree: str, into: Path) -> dict[str, bytes] | None:
    if store.read_manifest(tree) is None:
        return None
    shutil.rmtree(into, ignore_errors=True)
    return content(store.pull_tree(tree, into=into))


def assert_nothing_is_left(store: Store, tree: str) -> None:
    manifest = store.read_manifest(tree)
    assert manifest is not None
    if isinstance(store, S3Store):
        keys = {entry.key for entry in store._bucket.list_objects(f"{tree}/")}
    else:
        assert isinstance(store, DirectoryStore)
        paths = (path for path in (store.root / tree).rglob("*") if path.is_file())
        keys = {path.relative_to(store.root).as_posix() for path in paths}
    assert keys == {
        f"{tree}/{key}" for key in ("manifest.json", *(f.stored_at for f in manifest.files))
    }


@pytest.mark.parametrize("kind", ["directory", "s3_environment"])
@pytest.mark.parametrize(
    "seeds", [range(8), pytest.param(range(1000, 1200), marks=pytest.mark.soak)]
)
def test_no_schedule_tears_or_loses_a_tree(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, seeds: range
) -> None:
    if kind == "directory":
        store = open_store(str(tmp_path / "store"))
    else:
        store = open_store(request.getfixturevalue(kind)["TITA_STORE"])
    for seed in seeds:
        one_schedule(store, seed, tmp_path)
