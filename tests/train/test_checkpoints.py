"""Checkpoints in a directory and in real S3: only complete ones of the same run are used."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tita.errors import ExitCode, StoreUnavailable, TitaError
from tita.gang import free_port
from tita.recipes import TrainRecipe, validate_recipe
from tita.settings import settings
from tita.storage import Store, open_store, s3_client
from tita.storage.s3_client import ExpiredCredentials
from tita.train import checkpoints as module
from tita.train.checkpoints import Checkpoints, retry_store
from tita.train.run import TrainRun


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
    given: dict[str, Any] = own | changes
    # With each checkpoint, its step is recorded, too.
    return Checkpoints(**given, is_same_run=lambda meta: given["meta"].items() <= meta.items())


def save(some: Checkpoints, *, step: int, folder: Path) -> None:
    """As the trainer and its callback at a saving step."""
    saved = folder / f"checkpoint-{step}"
    saved.mkdir(parents=True)
    (saved / "state.bin").write_bytes(bytes([step]) * 1000)
    args = SimpleNamespace(output_dir=str(folder), local_process_index=0)
    some.on_save(args, SimpleNamespace(global_step=step), None)
    some.finish()


def test_the_newest_complete_checkpoint_is_restored(
    store: Store, tmp_path: Path, lone_rank: None
) -> None:
    run = checkpoints(store)
    for step in (2, 4, 6):
        save(run, step=step, folder=tmp_path / "one")
    assert run.complete() == [6, 4], "two are kept"
    found = checkpoints(store).restore(tmp_path / "other")
    assert found == tmp_path / "other/checkpoint-6"
    assert (found / "state.bin").read_bytes() == bytes([6]) * 1000


@pytest.mark.parametrize("num_nodes", [2, 5])
def test_a_node_restores_its_shards_and_what_is_shared_and_copies_no_bytes(
    store: Store,
    tmp_path: Path,
    lone_rank: None,
    monkeypatch: pytest.MonkeyPatch,
    num_nodes: int,
) -> None:
    every = [checkpoints(store, node=node, num_nodes=num_nodes) for node in range(num_nodes)]
    for node in range(num_nodes):
        folder = tmp_path / f"node-{node}"
        (folder / "global_step2").mkdir(parents=True)
        names = [
            f"global_step2/bf16_zero_pp_rank_{node}_mp_rank_00_optim_states.pt",
            f"global_step2/zero_pp_rank_{node}_mp_rank_00_model_states.pt",
            f"rng_state_{node}.pth",
            *(["latest", "global_step2/mp_rank_00_model_states.pt"] if node == 0 else []),
            *(["best/state.json"] if node == 0 else []),
        ]
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(bytes([node]) * 1000)
        every[node]._push(2, folder)
    pull, pulled = store.pull_tree, {}

    def pull_tree(prefix: str, *, into: Path, **options: Any) -> Path:
        found = pull(prefix, into=into, **options)
        pulled.update({path.name: path.stat().st_ino for path in into.rglob("*.p*")})
        return found

    node = num_nodes - 1
    monkeypatch.setattr(every[node]._store, "pull_tree", pull_tree)
    restored = every[node].restore(tmp_path / "other")
    assert restored == tmp_path / "other/checkpoint-2"
    # The best weights are rank 0's.
    assert (tmp_path / "other/best/state.json").is_file() == (node == 0)
    files = {path.name: path for path in restored.rglob("[!.]*") if path.is_file()}
    assert set(files) == {
        *("latest", "mp_rank_00_model_states.pt", f"rng_state_{node}.pth"),
        f"bf16_zero_pp_rank_{node}_mp_rank_00_optim_states.pt",
        f"zero_pp_rank_{node}_mp_rank_00_model_states.pt",
    }
    assert files["latest"].read_bytes() == bytes(1000)
    assert files[f"rng_state_{node}.pth"].read_bytes() == bytes([node]) * 1000
    assert {n: path.stat().st_ino for n, path in files.items() if ".p" in n} == pulled
    assert {path.name for path in (tmp_path / "other").iterdir()} <= {"checkpoint-2", "best"}


def test_incomplete_checkpoints_are_removed(store: Store, tmp_path: Path) -> None:
    """One node may skip a checkpoint that another uploads, which is then never complete."""
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


def test_a_failed_upload_is_reported_by_finish_and_does_not_block_later_ones(
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


def test_a_corrupt_checkpoint_is_skipped(store: Store, tmp_path: Path, lone_rank: None) -> None:
    for step in (2, 4):
        save(checkpoints(store), step=step, folder=tmp_path / "one")
    store.put("runs/a/checkpoints/4/node-0/state.bin", b"\4" * 500)
    assert checkpoints(store).restore(tmp_path / "other") == tmp_path / "other/checkpoint-2"


def test_incomplete_checkpoints_and_those_of_another_recipe_are_ignored(
    store: Store, tmp_path: Path, lone_rank: None
) -> None:
    save(checkpoints(store), step=2, folder=tmp_path / "one")
    assert checkpoints(store, num_nodes=2).restore(tmp_path / "two") is None
    assert checkpoints(store, meta={"recipe": 2}).restore(tmp_path / "three") is None
    store.delete("runs/a/checkpoints/2/node-0/manifest.json")
    assert checkpoints(store).restore(tmp_path / "four") is None


def test_later_checkpoints_of_another_world_size_do_not_replace_new_ones(
    store: Store, tmp_path: Path, lone_rank: None
) -> None:
    """A run that starts again with another number of processes keeps its own checkpoints."""
    old, new = ({"meta": {"processes": number}} for number in (4, 2))
    for step in (100, 200):
        save(checkpoints(store, **old), step=step, folder=tmp_path / "old")
    again = checkpoints(store, **new)
    assert again.restore(tmp_path / "none") is None
    for step in (20, 40, 60):
        save(again, step=step, folder=tmp_path / "new")
    assert again.complete() == [200, 100, 60, 40]
    assert checkpoints(store, **new).restore(tmp_path / "new2") == tmp_path / "new2/checkpoint-60"


class FailingStore:
    """A store that fails after its first listing."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._listings = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def list(self, prefix: str = "") -> Any:
        self._listings += 1
        if self._listings > 1:
            raise StoreUnavailable("away")
        return self._store.list(prefix)

    def read_manifest(self, prefix: str) -> Any:
        raise StoreUnavailable("away")


def test_an_unavailable_store_does_not_skip_the_checkpoint(
    store: Store, tmp_path: Path, lone_rank: None
) -> None:
    """The pod ends and is restarted, instead of training from step 0."""
    save(checkpoints(store), step=2, folder=tmp_path / "one")
    with pytest.raises(StoreUnavailable):
        checkpoints(FailingStore(store)).restore(tmp_path / "other")  # type: ignore[arg-type]


def test_one_line_a_round_while_the_store_is_away(
    s3_environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each round of `retry_store` has eight attempts of the client, of which it says nothing."""
    caplog.set_level("INFO", logger="tita")
    monkeypatch.setenv("TITA_S3_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    settings.cache_clear()
    monkeypatch.setattr(s3_client.retry, "sleep", lambda _: None)
    monkeypatch.setattr(s3_client, "_retry_log", quiet := s3_client.RetryLog())
    monkeypatch.setattr(s3_client.retry, "before_sleep", quiet)
    store = open_store(s3_environment["TITA_STORE"])
    with pytest.raises(StoreUnavailable):
        retry_store(lambda: store.exists("a"), pauses_s=(0.0, 0.0))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2, said
    assert all("the store does not answer" in line for line in said)
    assert not caplog.messages
    # Elsewhere nobody else reports it, so the client does: once for all requests of a minute.
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            store.exists("a")
    assert len(caplog.messages) == 1
    assert "retrying (attempt 5 of 8)" in caplog.messages[0]


def test_a_run_goes_on_from_a_checkpoint_of_an_earlier_version(
    tmp_path: Path, lone_rank: None
) -> None:
    """It lacks fields that are new, and records others that make no difference."""
    recipe = validate_recipe(TrainRecipe, {"model": "m", "pairs": "p"})
    store = open_store(str(tmp_path / "store"))
    run = TrainRun(recipe=recipe, name="a", out="runs/a", folder=tmp_path, store=store)
    save(run.checkpoints(), step=1, folder=tmp_path / "saved")
    kept = tmp_path / "store/runs/a/checkpoints/1/node-0/manifest.json"
    manifest = json.loads(kept.read_text())
    assert manifest["meta"]["recipe"].pop("keep") == "last"
    manifest["meta"]["recipe"]["logging_steps"] = 77
    kept.write_text(json.dumps(manifest))
    assert run.checkpoints().restore(tmp_path / "here")
    manifest["meta"]["recipe"]["beta"] = 0.77
    kept.write_text(json.dumps(manifest))
    assert run.checkpoints().restore(tmp_path / "there") is None


def test_training_stops_when_no_checkpoint_can_be_uploaded_any_more(
    store: Store, tmp_path: Path, lone_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new pod may have new credentials; this one would train to the end for nothing."""
    some = checkpoints(store)
    state = SimpleNamespace(global_step=3)
    for error, stops in ((StoreUnavailable("away"), False), (ExpiredCredentials("late"), True)):

        def push(*_: Any, error: TitaError = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(some._store, "push_tree", push)
        monkeypatch.setattr(module, "retry_store", lambda work: work())
        with pytest.raises(type(error)):
            save(some, step=2 + stops, folder=tmp_path)
        with pytest.raises(ExpiredCredentials) if stops else nullcontext():
            some.on_step_end(None, state, None)


def test_a_full_store_ends_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Other errors of a network file system are over at the next start."""

    def write(number: int) -> None:
        raise OSError(number, os.strerror(number), "/store/x")

    with pytest.raises(TitaError, match="/store/x: no space left on device; free some") as full:
        retry_store(lambda: write(errno.ENOSPC), pauses_s=(0.0,))
    assert full.value.exit_code == ExitCode.USER
    with pytest.raises(StoreUnavailable):
        retry_store(lambda: write(errno.EIO), pauses_s=(0.0,))
    assert capsys.readouterr().err.count("retrying") == 2
