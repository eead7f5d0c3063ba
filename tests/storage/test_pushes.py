"""Pushes to one tree: of several that overlap one wins, and what they may not do is refused."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from tenacity import wait_none

from tita.errors import DamagedData, ExitCode, PushConflict, TitaError
from tita.storage import Store, directory_push, open_store, resolve
from tita.storage.cache import TreeCache
from tita.storage.directory import DirectoryStore
from tita.storage.locate import Pointer, find_tree, split_name, write_pointer
from tita.storage.s3_store import S3Store
from tita.storage.store import list_trees

NOW = timedelta(0)
PUSH = """
import sys
from pathlib import Path
from tita.cli.main import tita
tita(["data", "push", *sys.argv[1:]])
"""


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tita.storage.s3_client.retry.wait", wait_none())


def make(folder: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def content(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): path.read_text()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".tita-" not in path.relative_to(root).as_posix()
    }


def pulled(store: Store, name: str, tmp_path: Path) -> dict[str, str]:
    into = tmp_path / f"pulled-{time.monotonic_ns()}"
    return content(store.pull_tree(name, into=into))


class DuringPush:
    """Calls `act` once while a push to a store is between its check and its manifest."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
        self.acts = [act]
        for module in ("s3_push", "directory_push"):
            build = f"tita.storage.{module}.build_manifest"
            monkeypatch.setattr(build, self.wrap(build))

    def wrap(self, name: str) -> Callable[..., object]:
        module, _, attribute = name.rpartition(".")
        original = getattr(sys.modules[module], attribute)

        def wrapped(*arguments: object, **options: object) -> object:
            found = original(*arguments, **options)
            if self.acts:
                self.acts.pop()()
            return found

        return wrapped


@pytest.mark.parametrize("is_first", [True, False], ids=["new tree", "existing tree"])
def test_second_of_two_pushes_is_told_and_changes_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    before = make(tmp_path / "before", {"x": "old", "same": "same"})
    mine = make(tmp_path / "mine", {"x": "mine", "same": "same", "m": "m"})
    other = make(tmp_path / "other", {"x": "other", "same": "same", "o": "o"})
    if not is_first:
        store.push_tree(before, "data")
    DuringPush(monkeypatch, lambda: store.push_tree(other, "data"))
    with pytest.raises(PushConflict, match="data: another process changed this tree") as caught:
        store.push_tree(mine, "data")
    assert caught.value.exit_code == ExitCode.CONFLICT == 73
    assert pulled(store, "data", tmp_path) == content(other)
    store.push_tree(mine, "data")
    assert pulled(store, "data", tmp_path) == content(mine)


def test_two_pushes_of_the_same_content_both_succeed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = make(tmp_path / "mine", {"x": "mine", "deep/y": "y"})
    DuringPush(monkeypatch, lambda: store.push_tree(mine, "data", meta={"of": 1}))
    store.push_tree(mine, "data", meta={"of": 1})
    assert pulled(store, "data", tmp_path) == content(mine)
    DuringPush(monkeypatch, lambda: store.push_tree(mine, "data", meta={"of": 2}))
    with pytest.raises(PushConflict):
        store.push_tree(mine, "data", meta={"of": 3})


@pytest.fixture
def started() -> Iterator[list["subprocess.Popen[bytes]"]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_push_that_was_stopped_half_way_loses_with_its_own_exit_code(
    store: Store, tmp_path: Path, started: list["subprocess.Popen[bytes]"]
) -> None:
    mine = make(tmp_path / "mine", {f"{n:03}": f"mine {n}" * 2000 for n in range(300)})
    other = make(tmp_path / "other", {f"{n:03}": f"other {n}" for n in range(300)})
    process = subprocess.Popen(
        [sys.executable, "-c", PUSH, str(mine), "data"], stderr=subprocess.PIPE
    )
    started.append(process)
    root = store.root / "data" if isinstance(store, DirectoryStore) else None

    def has_begun() -> bool:
        if root is not None:
            return any(root.glob(".tita-stage-*/20"))
        assert isinstance(store, S3Store)
        return len(store._bucket.list_objects("data/")) > 20

    while not has_begun():
        assert process.poll() is None, "the push has ended before it could be stopped"
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    assert store.read_manifest("data") is None
    store.push_tree(other, "data")
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == ExitCode.CONFLICT
    assert b"another process changed this tree" in said
    assert pulled(store, "data", tmp_path) == content(other)


def test_content_of_a_tree_stays_readable_while_it_is_replaced(
    store: Store, tmp_path: Path
) -> None:
    """A reader that has the old manifest reads the old tree after a push, too."""
    old = make(tmp_path / "old", {"a": "old", "b": "same", "gone": "x"})
    new = make(tmp_path / "new", {"a": "new", "b": "same", "come": "y"})
    store.push_tree(old, "data")
    if isinstance(store, DirectoryStore):
        place = store.pull_tree("data")
        store.push_tree(new, "data")
        assert content(place).items() >= content(old).items()
        assert content(store.pull_tree("data")) == content(new)
    else:
        assert isinstance(store, S3Store)
        manifest = store.read_manifest("data")
        assert manifest is not None
        store.push_tree(new, "data")
        assert content(store.copy_files("data", manifest, tmp_path / "late")) == content(old)
    store.prune("", older_than=NOW)
    assert pulled(store, "data", tmp_path) == content(new)


def test_push_during_a_prune_never_ends_torn(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(tmp_path / "1", {"a": "1", "b": "1"})
    second = make(tmp_path / "2", {"a": "2", "b": "1"})
    store.push_tree(first, "data")
    store.push_tree(second, "data")
    # The third push has the content of the first one, which the prune removes.
    DuringPush(monkeypatch, lambda: store.prune("", older_than=NOW))
    try:
        store.push_tree(first, "data")
    except PushConflict:
        assert pulled(store, "data", tmp_path) == content(second)
        store.push_tree(first, "data")
    assert pulled(store, "data", tmp_path) == content(first)


def test_prune_just_before_the_manifest_is_written_makes_the_push_fail(
    s3_environment: dict[str, str], tmp_path: Path
) -> None:
    store, other = (S3Store(s3_environment["TITA_STORE"]) for _ in range(2))
    first = make(tmp_path / "1", {"a": "1", "b": "1"})
    store.push_tree(first, "data")
    pruned: list[str] = []

    def prune(params: dict[str, object], **_: object) -> None:
        if str(params["url_path"]).endswith("data/manifest.json") and not pruned:
            pruned.extend(one.state for one in other.prune("", older_than=NOW))

    store._bucket._client.meta.events.register("before-call.s3.PutObject", prune)
    with pytest.raises(PushConflict):
        store.push_tree(make(tmp_path / "2", {"a": "2", "b": "1"}), "data")
    assert pruned == ["removed"]
    assert pulled(store, "data", tmp_path) == content(first)


def test_folder_that_cannot_be_read_is_refused(store: Store, tmp_path: Path) -> None:
    folder = make(tmp_path / "d", {"a": "a", "sub/b": "b"})
    store.push_tree(folder, "data")
    (folder / "sub").chmod(0)
    # Another user must reach the folder; pytest creates its own for this user only.
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.geteuid() and path.is_relative_to(tempfile.gettempdir()):
            path.chmod(path.stat().st_mode | 0o055)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        with pytest.raises(TitaError, match=r"sub: cannot be read \(permission denied\)"):
            store.push_tree(folder, "data")
    finally:
        if is_root:
            os.seteuid(0)
        (folder / "sub").chmod(0o755)
    assert pulled(store, "data", tmp_path) == {"a": "a", "sub/b": "b"}


def run_tita(*arguments: object) -> int:
    from tita.cli.commands import app
    from tita.cli.main import run

    return run(app, ["data", *map(str, arguments)], name="tita")


def test_more_than_half_of_a_tree_is_removed_only_with_delete(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path / "d", {name: name for name in "abcd"})
    assert run_tita("push", folder, "data") == 0
    for name in "ab":
        (folder / name).unlink()
    assert run_tita("push", folder, "data") == 0
    (empty := tmp_path / "empty").mkdir()
    capsys.readouterr()
    assert run_tita("push", empty, "data") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "would remove 2 of 2 files, such as 'c'" in line
    assert "--delete" in line
    assert pulled(store, "data", tmp_path) == {"c": "c", "d": "d"}
    (folder / "c").unlink()
    make(folder, {"x": "x"})
    assert run_tita("push", folder, "data") == 0
    assert run_tita("push", empty, "data", "--delete") == 0
    assert pulled(store, "data", tmp_path) == {}


@pytest.mark.parametrize(("first", "second"), [("data", "data/sub"), ("data/sub", "data")])
def test_tree_inside_a_tree_is_refused(
    store: Store, tmp_path: Path, first: str, second: str
) -> None:
    q = make(tmp_path / "q", {"sub/b": "q", "a": "q"})
    r = make(tmp_path / "r", {"b": "r"})
    store.push_tree(q, first)
    with pytest.raises(TitaError, match=rf"{second}: there is a tree '{first}'"):
        store.push_tree(r, second)
    assert pulled(store, first, tmp_path) == content(q)
    store.push_tree(r, "database")
    store.push_tree(q, "runs/a/checkpoints/5/node-0")
    store.push_tree(r, "runs/a")
    store.push_tree(q, "runs/a/checkpoints/6/node-0")


def test_store_inside_the_pushed_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "work", {"a": "a"})
    monkeypatch.chdir(tmp_path / "work")
    assert run_tita("push", ".", "data", "--store", "tita-store") == 2
    assert "the store is inside the folder; push a folder without" in capsys.readouterr().err
    assert not Path("tita-store").exists()
    assert run_tita("push", ".", "data", "--store", ".") == 2


def test_users_may_have_any_file_names(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"manifest.json": '{"mine": 1}', "app/manifest.json": "[]", "a": "a", "b c\u2028": "b"}
    folder = make(tmp_path / "d", files)
    store.push_tree(folder, "data/x")
    store.push_tree(make(tmp_path / "e", {"e": "e"}), "data/y")
    assert pulled(store, "data/x", tmp_path) == files
    (copy := tmp_path / "copy").mkdir()
    (copy / "manifest.json").write_text("my own")
    store.pull_tree("data/y", into=copy)
    assert content(copy) == {"manifest.json": "my own", "e": "e"}
    assert [name for name, _ in list_trees(store)] == ["data/x", "data/y"]
    assert content(resolve("data/x/app", store=store)) == {"manifest.json": "[]"}
    # The name changes nothing for a push of what was pulled.
    again = store.pull_tree("data/x", into=tmp_path / "again")
    assert store.push_tree(again, "data/z").digest == store.push_tree(folder, "data/x").digest


def test_cached_tree_has_the_users_manifest(s3_environment: dict[str, str], tmp_path: Path) -> None:
    store = open_store(s3_environment["TITA_STORE"])
    files = {"manifest.json": "mine", "a": "a"}
    store.push_tree(make(tmp_path / "d", files), "data")
    for _ in range(2):
        assert content(store.pull_tree("data")) == files
    assert [(tree.digest, tree.in_use) for tree in TreeCache.from_settings().trees()] == [
        (store.read_manifest("data").digest, True)
    ]


def test_bad_object_never_hides_the_other_trees(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.push_tree(make(tmp_path / "d", {"a": "a"}), "data/good")
    store.put("data/bad/manifest.json", b"{}")
    store.put("data/worse/manifest.json", b"\xff")
    assert run_tita("ls", "-o", "json") == 0
    printed = capsys.readouterr()
    assert [row["tree"] for row in json.loads(printed.out)] == ["data/good"]
    assert "data/bad/manifest.json: invalid manifest" in printed.err
    assert "data/worse/manifest.json: invalid manifest" in printed.err


def test_s3_name_is_understood_as_a_store_and_a_name(
    s3_environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TITA_STORE", "tita-store")
    folder = make(tmp_path / "d", {"a": "a"})
    uri = f"{s3_environment['TITA_STORE']}/data/x"
    assert run_tita("push", folder, uri) == 0
    assert not Path("tita-store").exists()
    assert pulled(open_store(s3_environment["TITA_STORE"]), "data/x", tmp_path) == {"a": "a"}
    assert run_tita("pull", uri, tmp_path / "copy") == 0
    assert content(tmp_path / "copy") == {"a": "a"}
    capsys.readouterr()
    assert run_tita("push", folder, uri, "--store", "s3://tests") == 2
    assert "--store: the name" in capsys.readouterr().err
    with pytest.raises(TitaError, match="a URI is not the name of a tree"):
        open_store("other").push_tree(folder, "s3://bucket/data")


@pytest.mark.parametrize("name", ["/data", "./data", "~/data", "a//b", "a/./b", "a\nb", ".tita-x"])
def test_what_is_no_name_of_a_tree_is_refused(store: Store, tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "d", {"a": "a"})
    words = r"not the name of a tree|leaves the store"
    with pytest.raises(TitaError, match=words):
        split_name(name, store=store.uri)
    with pytest.raises(TitaError, match=words):
        store.push_tree(folder, name)
    assert list(store.list()) == []


def test_pointer_is_followed_or_refused_by_every_command(store: Store, tmp_path: Path) -> None:
    run = make(tmp_path / "run", {"model/config.json": "{}", "run.json": "{}"})
    store.push_tree(run, "runs/a")
    write_pointer(store, "reward/current", Pointer(target="runs/a/model", moved="now"))
    assert find_tree(store, "reward/current") == ("runs/a", "model")
    assert run_tita("pull", "reward/current", tmp_path / "copy") == 0
    assert content(tmp_path / "copy") == {"config.json": "{}"}
    assert content(resolve("reward/current", store=store)) == {"config.json": "{}"}
    with pytest.raises(TitaError, match="there is an object of this name, such as a pointer"):
        store.push_tree(run, "reward/current")
    store.push_tree(run, "other/current")
    with pytest.raises(TitaError, match="there is a tree of this name"):
        write_pointer(store, "other/current", Pointer(target="runs/a", moved="now"))
    assert content(resolve("other/current", store=store)).items() >= content(run).items()


def test_pull_over_an_older_copy_names_what_stays(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path / "d", {"a": "a", "deep/old": "old", "edited": "e"})
    store.push_tree(folder, "data")
    copy = tmp_path / "copy"
    assert run_tita("pull", "data", copy) == 0
    make(copy, {"own": "mine", "edited": "by me"})
    for name in ("deep/old", "edited"):
        (folder / name).unlink()
    make(folder, {"a": "new"})
    store.push_tree(folder, "data")
    for _ in range(2):
        capsys.readouterr()
        assert run_tita("pull", "data", copy) == 0
        assert "2 files of earlier pulls stay" in (said := capsys.readouterr().err)
        assert "deep/old, edited; --delete removes them" in said
    assert run_tita("pull", "data", copy, "--delete") == 0
    assert "kept edited, which changed" in capsys.readouterr().err
    assert content(copy) == {"a": "new", "own": "mine", "edited": "by me"}
    assert not (copy / "deep").exists()


def test_name_with_a_line_break_is_refused_in_one_line(store: Store, tmp_path: Path) -> None:
    folder = make(tmp_path / "d", {"a": "a", "two\nlines": "b"})
    with pytest.raises(TitaError, match=r"two\\nlines: the name has a control character; rename"):
        store.push_tree(folder, "data")


def test_key_that_is_too_long_is_refused_before_anything_is_sent(
    s3_environment: dict[str, str], tmp_path: Path
) -> None:
    store = open_store(s3_environment["TITA_STORE"])
    deep = "/".join(["ä" * 100] * 5)
    folder = make(tmp_path / "d", {f"{deep}/x": "a", "b": "b"})
    with pytest.raises(TitaError, match=r"the key has \d+ bytes, and S3 allows 1024; shorten"):
        store.push_tree(folder, "data")
    assert list(store.list()) == []
    with pytest.raises(TitaError, match="S3 allows 1024"):
        store.get("x" * 1025)


def test_push_heals_an_object_that_changed_at_the_same_size(store: Store, tmp_path: Path) -> None:
    folder = make(tmp_path / "d", {"a": "content", "b": "b"})
    store.push_tree(folder, "data")
    store.put("data/a", b"CONTENT")
    with pytest.raises(DamagedData, match=r"data/a.*push the tree again") as caught:
        store.pull_tree("data", into=tmp_path / "copy")
    assert caught.value.exit_code == ExitCode.DAMAGED == 65
    store.push_tree(folder, "data")
    assert pulled(store, "data", tmp_path) == content(folder)


def test_missing_object_is_damage_and_healed(store: Store, tmp_path: Path) -> None:
    folder = make(tmp_path / "d", {"a": "content", "b": "b"})
    store.push_tree(folder, "data")
    store.delete("data/a")
    with pytest.raises(DamagedData, match=r"data/a"):
        store.pull_tree("data", into=tmp_path / "copy")
    store.push_tree(folder, "data")
    assert pulled(store, "data", tmp_path) == content(folder)


def test_verify_reads_what_the_listing_cannot_show(
    s3_environment: dict[str, str], tmp_path: Path
) -> None:
    """An object whose ETag and metadata are those of other content, as on a damaged disk."""
    store = S3Store(s3_environment["TITA_STORE"])
    folder = make(tmp_path / "d", {"a": "content", "b": "b"})
    store.push_tree(folder, "data")
    manifest = json.loads(store.get("data/manifest.json"))
    (entry,) = (file for file in manifest["files"] if file["path"] == "a")
    store._bucket.put("data/a", b"CONTENT")
    (now,) = store._bucket.list_objects("data/a")
    entry["etag"] = now.etag
    store.put("data/manifest.json", json.dumps(manifest).encode())
    store.push_tree(folder, "data")
    with pytest.raises(DamagedData):
        store.pull_tree("data", into=tmp_path / "copy")
    assert run_tita("push", folder, "data", "--verify", "--store", store.uri) == 0
    assert pulled(store, "data", tmp_path) == content(folder)


def test_commands_show_and_remove_a_withdrawn_file(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As docs/storage.md describes it: a push without the file, and a prune."""
    folder = make(tmp_path / "d", {"a": "a", "b": "b", "withdrawn": "private"})
    store.push_tree(folder, "data")
    (folder / "withdrawn").unlink()
    store.push_tree(folder, "data")

    def unused(*words: str) -> list[dict[str, Any]]:
        capsys.readouterr()
        assert run_tita(*words, "--store", store.uri, "-o", "json") == 0
        found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
        return found

    (row,) = unused("ls", "--unused")
    assert (row["tree"], row["state"]) == ("data", "recent")
    assert unused("prune")[0]["state"] == "recent", "a push may be in progress"
    assert unused("prune", "--older-than", "0", "--dry-run")[0]["state"] == "removable"
    assert any("withdrawn" in info.key for info in store.list("data/"))
    assert unused("prune", "--older-than", "0")[0]["state"] == "removed"
    assert unused("ls", "--unused") == []
    assert not any("withdrawn" in info.key for info in store.list("data/"))


def test_store_of_an_earlier_version_is_read_and_a_push_upgrades_it(
    store: Store, tmp_path: Path
) -> None:
    files = {"a": "new", "deep/b": "b"}
    folder = make(tmp_path / "d", files)
    store.push_tree(folder, "data")
    body = json.loads(store.get("data/manifest.json"))
    (a,) = (entry for entry in body["files"] if entry["path"] == "a")
    # Version 1, and a push that was killed before it moved `a` to its place.
    body = {"version": 1, "digest": body["digest"], "files": body["files"], "meta": {}}
    for entry in body["files"]:
        entry.pop("etag", None)
    if isinstance(store, S3Store):
        store._bucket.put(f"data/.tita-{a['sha256']}", b"new")
        store.put("data/a", b"old")
        a["key"] = f".tita-{a['sha256']}"
    store.put("data/manifest.json", json.dumps(body).encode())
    assert pulled(store, "data", tmp_path) == files
    upgraded = store.push_tree(folder, "data")
    assert store.read_manifest("data") == upgraded
    assert upgraded.push
    store.prune("", older_than=NOW)
    assert pulled(store, "data", tmp_path) == files


def test_push_needs_no_right_to_delete_and_prune_says_what_it_lacks(
    s3_environment: dict[str, str], tmp_path: Path
) -> None:
    store = S3Store(s3_environment["TITA_STORE"])
    folder = make(tmp_path / "d", {"a": "a", "b": "b"})

    def deny(**_: object) -> None:
        raise ClientError({"Error": {"Code": "AccessDenied"}}, "DeleteObject")

    store._bucket._client.meta.events.register("before-call.s3.DeleteObject", deny)
    store.push_tree(folder, "data")
    make(folder, {"a": "other"})
    store.push_tree(folder, "data")
    words = r"cannot delete unused content \(access denied\); all trees are complete; grant"
    with pytest.raises(TitaError, match=words):
        store.prune("", older_than=NOW)
    assert pulled(store, "data", tmp_path) == content(folder)


def test_prune_keeps_uploads_of_other_tools(s3_environment: dict[str, str], tmp_path: Path) -> None:
    store = S3Store(s3_environment["TITA_STORE"])
    store.push_tree(make(tmp_path / "d", {"a": "a"}), "data/x")
    for key in ("backups/disk.img", "data/x/large"):
        store._bucket.create_upload(key, sha256="0" * 64)
    store.prune("", older_than=NOW)
    assert [one.key for one in store._bucket.list_uploads("")] == ["backups/disk.img"]


def test_prune_removes_what_a_killed_first_push_left_and_nothing_else(
    s3_environment: dict[str, str], tmp_path: Path
) -> None:
    store = S3Store(s3_environment["TITA_STORE"])
    folder = make(tmp_path / "d", {"a": "a", "b": "b", "run.json": "final"})
    store.put("data/run.json", b"written by a job before")

    other = S3Store(s3_environment["TITA_STORE"])

    def stop(params: dict[str, object], **_: object) -> None:
        if str(params["url_path"]).endswith("/b"):
            # Transfers that have not begun are cancelled by it.
            while not other.exists("data/a"):
                time.sleep(0.01)
            raise KeyboardInterrupt

    store._bucket._client.meta.events.register("before-call.s3.PutObject", stop)
    with pytest.raises(KeyboardInterrupt):
        store.push_tree(folder, "data")
    store._bucket._client.meta.events.unregister("before-call.s3.PutObject", stop)
    assert store.exists("data/a")
    assert [one.state for one in store.find_unused("", older_than=timedelta(days=1))] == ["recent"]
    assert [one.state for one in store.prune("", older_than=NOW)] == ["removed"]
    assert [entry.key for entry in store._bucket.list_objects("data")] == ["data/run.json"]
    store.push_tree(folder, "data")
    assert pulled(store, "data", tmp_path) == content(folder)
    assert store.get("data/run.json") == b"written by a job before"


def test_manifest_or_claim_without_its_recorded_content_is_replaced_and_hides_nothing(
    s3_environment: dict[str, str], tmp_path: Path
) -> None:
    """A server may keep part of what a killed process was sending."""
    store = S3Store(s3_environment["TITA_STORE"])
    folder = make(tmp_path / "d", {"a": "a"})
    store.push_tree(folder, "good")

    def damage(key: str) -> None:
        bucket = store._bucket
        bucket._client.put_object(
            **bucket._address(key), Body=b"{", Metadata={"tita-sha256": "0" * 64}
        )

    damage("data/.tita-first.json")
    damage("other/manifest.json")
    assert [name for name, _ in list_trees(store)] == ["good"]
    assert store.find_unused("", older_than=NOW) == []
    with pytest.raises(DamagedData, match=r"other/manifest.json: the content does not match its"):
        store.pull_tree("other")
    for name in ("data", "other"):
        store.push_tree(folder, name)
        assert pulled(store, name, tmp_path) == {"a": "a"}


def test_prune_finds_what_a_killed_first_push_left_after_another_push(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DirectoryStore(tmp_path / "store")
    killed = make(tmp_path / "killed", {"a": "a of the killed", "b": "b"})
    second = make(tmp_path / "second", {"a": "a of the second"})

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(directory_push, "_write_to_disk", stop)
        with pytest.raises(KeyboardInterrupt):
            store.push_tree(killed, "data")
    assert (store.root / "data/b").is_file()
    store.push_tree(second, "data")
    assert [one.state for one in store.prune("", older_than=NOW)] == ["removed"]
    files = [path.name for path in (store.root / "data").rglob("*") if path.is_file()]
    assert sorted(files) == ["a", "manifest.json"]
    assert pulled(store, "data", tmp_path) == {"a": "a of the second"}
