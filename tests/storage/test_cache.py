"""The node's cache: sharing between trees and processes, eviction, detection of changes."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tita.cli.main import tita
from tita.errors import ExitCode, StoreUnavailable, TitaError
from tita.storage import Manifest, open_store
from tita.storage.cache import TreeCache, _link
from tita.storage.directory_push import staged
from tita.storage.files import try_lock
from tita.storage.locate import digest_folder
from tita.storage.manifest import build_manifest

RACE = Path(__file__).with_name("cache_race.py")
FILES = {"a/one": b"first" * 1000, "a/two": b"second" * 1000, "three": b"third" * 1000}


@pytest.fixture(autouse=True)
def not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tita.storage.cache._held", {})


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., tuple[Manifest, Path]]:
    def make(name: str, **changes: bytes) -> tuple[Manifest, Path]:
        folder = tmp_path / name
        for path, content in {**FILES, **changes}.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return build_manifest(folder), folder

    return make


class Source:
    """Copies files from a folder and records their paths."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched: list[str] = []

    def __call__(self, files: list) -> None:
        for file, path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((self.folder / file.path).read_bytes())
            self.fetched.append(file.path)


def content(root: Path) -> dict[str, bytes]:
    return {name: (root / name).read_bytes() for name in FILES}


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Release the locks of this process, as if it had ended."""
    from tita.storage import cache

    for descriptor in cache._held.values():
        os.close(descriptor)
    monkeypatch.setattr("tita.storage.cache._held", {})


def test_only_the_file_that_differs_is_fetched(tree, tmp_path: Path) -> None:
    cache = TreeCache(tmp_path / "cache")
    for name, changes, fetched in (
        ("old", {}, sorted(FILES)),
        ("new", {"three": b"other"}, ["three"]),
        ("same", {"three": b"other"}, []),
    ):
        manifest, folder = tree(name, **changes)
        source = Source(folder)
        held = cache.hold(manifest, fetch=source)
        assert content(held) == content(folder)
        assert sorted(source.fetched) == fetched


def test_modified_files_are_fetched_again(tree, tmp_path: Path) -> None:
    manifest, folder = tree("x")
    cache, source = TreeCache(tmp_path / "cache"), Source(folder)
    held = cache.hold(manifest, fetch=source)
    assert (held / "three").stat().st_mode & 0o222 == 0
    (held / "three").chmod(0o644)
    (held / "three").write_bytes(FILES["three"].replace(b"t", b"T"))
    (held / "a/one").unlink()
    source.fetched.clear()
    assert content(cache.hold(manifest, fetch=source)) == content(folder)
    assert source.fetched == ["three"]


def test_cached_manifest_has_the_meta_of_the_requested_tree(tree, tmp_path: Path) -> None:
    manifest, folder = tree("x")
    other = Manifest(files=manifest.files, meta={"of": "another"})
    cache = TreeCache(tmp_path / "cache")
    for one in (manifest, other):
        held = cache.hold(one, fetch=Source(folder))
        assert Manifest.from_json(held.with_suffix(".json").read_bytes(), where="") == one


def test_least_recently_used_tree_is_evicted(tree, tmp_path, monkeypatch) -> None:
    size = sum(map(len, FILES.values()))
    cache = TreeCache(tmp_path / "cache", limit_bytes=2 * size + 10)
    held = []
    for number in range(3):
        manifest, folder = tree(str(number), **{k: v + bytes([number]) for k, v in FILES.items()})
        held.append(cache.hold(manifest, fetch=Source(folder)))
        os.utime(held[-1].with_suffix(".lock"), (number, number))
        forget(monkeypatch)
    assert [path.exists() for path in held] == [False, True, True]
    assert cache.size_bytes() <= 2 * size + 10


def test_a_tree_that_does_not_fit_into_its_volume_is_refused(tree, tmp_path, monkeypatch) -> None:
    """The kubelet evicts a pod whose emptyDir exceeds its limit, which no file system reports."""
    size = sum(map(len, FILES.values()))
    cache = TreeCache(tmp_path / "cache", volume_bytes=size + 10)
    (first, folder), (other, its_folder) = (
        tree(name, **{k: v + name.encode() for k, v in FILES.items()}) for name in "xy"
    )
    cache.hold(first, fetch=Source(folder))
    source = Source(its_folder)
    with pytest.raises(TitaError, match=r"GiB needed, 0\.0 GiB free"):
        cache.hold(other, fetch=source)
    assert source.fetched == []
    forget(monkeypatch)
    assert content(cache.hold(other, fetch=source)) == content(its_folder)
    assert cache.size_bytes() <= size + 10


def test_tree_in_use_is_not_evicted(tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, folder = tree("x")
    cache = TreeCache(tmp_path / "cache")
    held = cache.hold(manifest, fetch=Source(folder))
    assert cache.prune(1 << 40) == 0
    assert content(held) == content(folder)
    forget(monkeypatch)
    assert cache.prune(1 << 40) == sum(map(len, FILES.values()))
    assert not held.exists()


def test_prune_during_a_fetch_removes_nothing(tree, tmp_path: Path) -> None:
    cache = TreeCache(tmp_path / "cache")
    manifest, folder = tree("x")
    source = Source(folder)

    def fetch(files: list) -> None:
        source(files)
        assert cache.prune(1 << 40) == 0

    assert content(cache.hold(manifest, fetch=fetch)) == content(folder)


def test_too_little_space_is_reported_before_the_fetch(tree, tmp_path, monkeypatch) -> None:
    manifest, folder = tree("x")
    monkeypatch.setattr(
        "tita.storage.cache.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})
    )
    source = Source(folder)
    with pytest.raises(TitaError, match=r"GiB needed, .* GiB free.*TITA_CACHE_DIR"):
        TreeCache(tmp_path / "cache").hold(manifest, fetch=source)
    assert source.fetched == []


def test_full_disk_is_reported(tree, tmp_path: Path) -> None:
    manifest, _ = tree("x")

    def full(_: list) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    with pytest.raises(TitaError, match=r"cache: the cache is not writable: no space left"):
        TreeCache(tmp_path / "cache").hold(manifest, fetch=full)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to run as somebody without rights")
def test_read_only_cache_is_usable_if_filled(tree, tmp_path: Path) -> None:
    manifest, folder = tree("x")
    held = TreeCache(tmp_path / "cache").hold(manifest, fetch=Source(folder))
    (tmp_path / "manifest.json").write_bytes(manifest.to_json())
    (tmp_path / "empty").mkdir()
    code = (
        "import os, sys; from pathlib import Path; from tita.storage import Manifest\n"
        "from tita.storage.cache import TreeCache\n"
        "here = Path(sys.argv[1]); os.chdir(here)\n"
        "manifest = Manifest.from_json(Path('manifest.json').read_bytes(), where='')\n"
        "os.setuid(65534)\n"
        "print(TreeCache(Path('cache')).hold(manifest, fetch=None))\n"
        "TreeCache(Path('empty')).hold(manifest, fetch=None)\n"
    )
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == str(held.relative_to(tmp_path))
    last = done.stderr.strip().splitlines()[-1]
    assert "the cache is not writable: permission denied" in last, done.stderr


HOLDER = """
import sys, time
from pathlib import Path
from tita.storage import open_store
pulled = open_store().pull_tree("data")
print(sum(len(path.read_bytes()) for path in pulled.rglob("*.bin")), flush=True)
time.sleep(float(sys.argv[1]))
"""


def test_cache_list_and_prune_commands(
    s3_environment: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def command(*arguments: str) -> Any:
        with pytest.raises(SystemExit) as caught:
            tita(["cache", *arguments, "-o", "json"])
        assert caught.value.code == 0
        return json.loads(capsys.readouterr().out)

    assert command("list") == []
    store = open_store()
    for name in ("data", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.bin").write_text(name * 1000)
        store.push_tree(tmp_path / name, name)
    store.pull_tree("other")
    forget(monkeypatch)
    reader = subprocess.Popen(
        [sys.executable, "-c", HOLDER, "60"], env=s3_environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "4000\n"
        assert [(row["tree"], row["size_bytes"], row["in_use"]) for row in command("list")] == [
            (f"{store.uri}/other", 5000, False),
            (f"{store.uri}/data", 4000, True),
        ]
        assert command("prune", "--keep-gib", "1") == {"freed_bytes": 0, "left_bytes": 9000}
        assert command("prune", "--keep-gib", "0") == {"freed_bytes": 5000, "left_bytes": 4000}
    finally:
        reader.kill()
        reader.communicate()
    assert command("prune", "--keep-gib", "0") == {"freed_bytes": 4000, "left_bytes": 0}
    with pytest.raises(SystemExit) as caught:
        tita(["cache", "prune"])
    assert caught.value.code == ExitCode.USER
    assert "--keep-gib 20" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_share_one_download_and_survive_a_killed_one(
    s3_environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "tree").mkdir()
    for number in range(40):
        (tmp_path / "tree" / f"{number}.bin").write_bytes(os.urandom(100_000))
    open_store().push_tree(tmp_path / "tree", "data")

    def start(wait_s: float) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(wait_s)],
            env=s3_environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    killed = start(60)
    objects = tmp_path / "cache" / "objects"
    deadline = time.monotonic() + 60
    while not list(objects.glob("*/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    others = [start(60) for _ in range(3)]
    for process in others:
        assert process.stdout is not None
        assert process.stdout.readline() == "4000000\n"
    (lock,) = (tmp_path / "cache" / "trees").glob("*.lock")
    assert try_lock(lock) is None, "the tree in use is not locked"
    for process in others:
        process.kill()
        process.communicate()
    freed = try_lock(lock)
    assert freed is not None
    os.close(freed)


def test_an_object_that_is_replaced_while_it_is_linked_is_linked(tmp_path: Path) -> None:
    """Two trees that are filled together share files, and Linux does not link to the old one."""
    source, done = tmp_path / "object", threading.Event()
    source.write_bytes(b"x")

    def replace() -> None:
        while not done.is_set():
            (tmp_path / "new").write_bytes(b"x")
            (tmp_path / "new").replace(source)

    other = threading.Thread(target=replace)
    other.start()
    try:
        for number in range(3000):
            _link(source, tmp_path / f"link-{number}")
    finally:
        done.set()
        other.join()
    with pytest.raises(FileNotFoundError):
        _link(tmp_path / "gone", tmp_path / "link")


def race(folder: Path, *arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, RACE, folder, *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_processes_that_start_together_all_get_the_tree(tmp_path: Path) -> None:
    done = race(tmp_path, "together", "20")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["8"] * 20


@pytest.mark.soak
def test_processes_that_start_together_all_get_the_tree_always(tmp_path: Path) -> None:
    done = race(tmp_path, "together", "200")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["8"] * 200


@pytest.mark.parametrize(
    "tries",
    [
        pytest.param("10", marks=pytest.mark.slow),
        pytest.param("200", marks=pytest.mark.soak),
    ],
)
def test_others_go_on_when_a_process_is_killed_while_it_fills(tmp_path: Path, tries: str) -> None:
    """Two trees share files, a pruner runs beside them, and one process is killed at any point."""
    done = race(tmp_path, "killed", tries)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["7"] * int(tries)


def test_a_hung_process_that_fills_is_reported_in_time(tmp_path: Path) -> None:
    done = race(tmp_path, "frozen", TITA_LOCK_TIMEOUT_S="1")
    assert done.returncode == ExitCode.HUNG, done.stderr
    said = done.stderr.strip().splitlines()[-1]
    assert re.search(r"trees/\w+\.fill: process \d+ holds the lock and made no progress for", said)
    assert f"process {done.stdout.strip()} " in said


def test_a_slow_process_that_fills_is_waited_for(tmp_path: Path) -> None:
    done = race(tmp_path, "slow", TITA_LOCK_TIMEOUT_S="3")
    assert done.returncode == 0, done.stderr


def test_a_damaged_tree_in_use_is_repaired_at_once(tree, tmp_path: Path) -> None:
    """Other processes use the tree and never release it; files that are intact stay in place."""
    manifest, folder = tree("x")
    cache, source = TreeCache(tmp_path / "cache"), Source(folder)
    held = cache.hold(manifest, fetch=source)
    other = try_lock(held.with_suffix(".lock"), shared=True)
    assert other is not None
    (held / "three").unlink()
    (held / "three").mkdir()
    assert content(cache.hold(manifest, fetch=source)) == content(folder)
    (held / "a/one").unlink()
    inode = (held / "a/two").stat().st_ino
    assert content(cache.hold(manifest, fetch=source)) == content(folder)
    assert (held / "a/two").stat().st_ino == inode
    os.close(other)


def test_a_failed_fill_does_not_keep_the_tree(tree, tmp_path: Path) -> None:
    manifest, _ = tree("x")
    cache = TreeCache(tmp_path / "cache")

    def away(_: list) -> None:
        raise StoreUnavailable("away")

    with pytest.raises(StoreUnavailable):
        cache.hold(manifest, fetch=away)
    (lock,) = (tmp_path / "cache" / "trees").glob("*.lock")
    descriptor = try_lock(lock)
    assert descriptor is not None
    os.close(descriptor)


def test_prune_removes_shards_of_a_killed_push(tmp_path: Path) -> None:
    cache = TreeCache(tmp_path)
    killed = cache.packing / ".tita-stage-0" / "shards"
    killed.mkdir(parents=True)
    (killed / "00000.tar").write_bytes(b"x" * 5000)
    with staged(cache.packing) as alive:  # it removes those that were killed, too
        killed.mkdir(parents=True)
        (killed / "00000.tar").write_bytes(b"x" * 5000)
        (alive.folder / "00000.tar").write_bytes(b"x")
        assert cache.prune(0) == 5000
        assert [path.name for path in cache.packing.rglob("*.tar")] == ["00000.tar"]


def test_content_is_cached_only_under_its_own_digest(tmp_path: Path) -> None:
    """A tree may have a file of the same name in the cache, which is not read again."""
    cache, right = TreeCache(tmp_path), hashlib.sha256(b"right").hexdigest()
    assert cache.content(right, fetch=lambda: b"wrong") == b"wrong"
    assert not any((tmp_path / "objects").glob("*/*"))
    assert cache.content(right, fetch=lambda: b"right") == b"right"
    assert cache.content(right, fetch=lambda: b"wrong") == b"right"


def test_digests_of_cached_trees_are_those_of_their_manifests(
    tree: Callable[..., tuple[Manifest, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their files never change, and a model has many gigabytes; other folders are read."""
    manifest, folder = tree("model")
    cache = TreeCache(tmp_path / "cache")
    cached = cache.hold(manifest, fetch=Source(folder))
    expected = [manifest.digest, build_manifest(folder / "a").digest]
    assert [digest_folder(folder), digest_folder(folder / "a")] == expected
    monkeypatch.setattr("tita.storage.locate.build_manifest", None)
    assert [digest_folder(cached), digest_folder(cached / "a")] == expected
