"""Checkpoints in a directory and in real S3: only whole ones of the same run are seen."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tita.errors import StoreUnavailable
from tita.storage import Store, open_store
from tita.train import checkpoints as module
from tita.train.checkpoints import Checkpoints


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A store of each kind."""
    if request.param == "directory":
        yield open_store(str(tmp_path / "store"))
    else:
        yield open_store(request.getfixturevalue("s3_environment")["TITA_STORE"])


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SHORT_PAUSES_S", (0.0,))


def checkpoints(store: Store, **changes: Any) -> Checkpoints:
    own = {"store": store, "out": "runs/a", "node": 0, "num_nodes": 1, "meta": {"recipe": 1}}
    return Checkpoints(**own | changes)


def save(some: Checkpoints, *, step: int, folder: Path) -> None:
    """What the trainer and its callback do at a saving step."""
    saved = folder / f"checkpoint-{step}"
    saved.mkdir(parents=True)
    (saved / "state.bin").write_bytes(bytes([step]) * 1000)
    args = SimpleNamespace(output_dir=str(folder), local_process_index=0)
    some.on_save(args, SimpleNamespace(global_step=step), None)
    some.finish()


def test_the_newest_whole_one_is_restored_elsewhere(
    store: Store, tmp_path: Path, lone_rank: None
) -> None:
    run = checkpoints(store)
    for step in (2, 4, 6):
        save(run, step=step, folder=tmp_path / "one")
    assert run.complete() == [6, 4], "two are kept"
    found = checkpoints(store).restore(tmp_path / "other")
    assert found == tmp_path / "other/checkpoint-6"
    assert (found / "state.bin").read_bytes() == bytes([6]) * 1000


def test_what_an_overtaken_node_left_is_removed(store: Store, tmp_path: Path) -> None:
    """One node may skip a checkpoint that another has brought up: it is never complete."""
    both = [checkpoints(store, node=node, num_nodes=2) for node in range(2)]
    store.put("runs/a/checkpoints/2/node-1/state.bin", b"half")
    for step in (4, 6, 8):
        for node in (1, 0):
            both[node]._push(step, _folder(tmp_path / f"{step}-{node}"))
        both[0]._remove_old()
    assert both[0].complete() == [8, 6]
    assert {entry.key.split("/")[3] for entry in store.list("runs/a/")} == {"6", "8"}


def _folder(path: Path) -> Path:
    path.mkdir()
    (path / "state.bin").write_bytes(b"state")
    return path


def test_an_upload_that_breaks_is_told_at_the_end_and_no_later_one_waits(
    store: Store, tmp_path: Path, lone_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = checkpoints(store)
    push = store.push_tree
    monkeypatch.setattr(some._store, "push_tree", lambda *a, **o: {}["unforeseen"])
    with pytest.raises(StoreUnavailable, match="unforeseen"):
        save(some, step=2, folder=tmp_path)
    monkeypatch.setattr(some._store, "push_tree", push)
    save(some, step=4, folder=tmp_path)
    assert some.complete() == [4]


def test_a_torn_one_is_passed_over(store: Store, tmp_path: Path, lone_rank: None) -> None:
    for step in (2, 4):
        save(checkpoints(store), step=step, folder=tmp_path / "one")
    store.put("runs/a/checkpoints/4/node-0/state.bin", b"\4" * 500)
    assert checkpoints(store).restore(tmp_path / "other") == tmp_path / "other/checkpoint-2"


def test_one_without_all_nodes_or_of_another_recipe_is_not_seen(
    store: Store, tmp_path: Path, lone_rank: None
) -> None:
    save(checkpoints(store), step=2, folder=tmp_path / "one")
    assert checkpoints(store, num_nodes=2).restore(tmp_path / "two") is None
    assert checkpoints(store, meta={"recipe": 2}).restore(tmp_path / "three") is None
    store.delete("runs/a/checkpoints/2/node-0/manifest.json")
    assert checkpoints(store).restore(tmp_path / "four") is None


def test_those_of_another_gang_that_came_further_push_none_out(
    store: Store, tmp_path: Path, lone_rank: None
) -> None:
    """A run that begins again with another number of processes keeps what it saves."""
    old, new = ({"meta": {"processes": number}} for number in (4, 2))
    for step in (100, 200):
        save(checkpoints(store, **old), step=step, folder=tmp_path / "old")
    again = checkpoints(store, **new)
    assert again.restore(tmp_path / "none") is None
    for step in (20, 40, 60):
        save(again, step=step, folder=tmp_path / "new")
    assert again.complete() == [200, 100, 60, 40]
    assert checkpoints(store, **new).restore(tmp_path / "new2") == tmp_path / "new2/checkpoint-60"


class Away:
    """A store whose listing answers and then nothing more does."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._asked = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def list(self, prefix: str = "") -> Any:
        self._asked += 1
        if self._asked > 1:
            raise StoreUnavailable("away")
        return self._store.list(prefix)

    def read_manifest(self, prefix: str) -> Any:
        raise StoreUnavailable("away")


def test_a_store_that_goes_away_does_not_cost_the_checkpoint(
    store: Store, tmp_path: Path, lone_rank: None
) -> None:
    """The pod ends, to be started again, rather than begin at the beginning."""
    save(checkpoints(store), step=2, folder=tmp_path / "one")
    with pytest.raises(StoreUnavailable):
        checkpoints(Away(store)).restore(tmp_path / "other")  # type: ignore[arg-type]
