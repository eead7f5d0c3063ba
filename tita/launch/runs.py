"""Training runs in the store, and which one is promoted."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tita.errors import TitaError
from tita.launch.objects import INSTANCE_LABEL
from tita.records import TrainProgress, read_progress
from tita.storage import Store, open_store
from tita.storage.locate import Pointer, read_pointer, write_pointer

if TYPE_CHECKING:  # `tita runs` must not load the kubernetes client
    from tita.launch.cluster import Cluster

CURRENT = "reward/current"


_PAST = "reward/past/"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run of `train-dpo` in the store."""

    run: str
    done: bool
    promoted: bool
    recipe: dict[str, Any]
    progress: TrainProgress | None
    checkpoints: tuple[str, ...]
    facts: dict[str, Any]

    def row(self) -> dict[str, Any]:
        """The columns of `tita runs list`."""
        last = self.progress
        return {
            "run": self.run,
            "state": "done" if self.done else "open",
            "step": f"{last.step}/{last.steps}" if last else None,
            "loss": round(last.loss, 4) if last else None,
            "margin": round(last.reward_margin, 3) if last else None,
            "accuracy": round(last.reward_accuracy, 3) if last else None,
            "promoted": "yes" if self.promoted else None,
        }

    def to_dict(self) -> dict[str, Any]:
        """All of it, as values that JSON knows."""
        return asdict(self)


def list_runs(store: Store) -> list[RunRecord]:
    """All runs, whole or open, by name."""
    names = {info.key.split("/")[1] for info in store.list("runs/") if info.key.count("/") >= 2}
    return [read_run(store, name) for name in sorted(names)]


def read_run(store: Store, run: str) -> RunRecord:
    """One run.

    Raises:
        TitaError: nothing of it is in the store.
    """
    root = f"runs/{run}"
    keys = [info.key for info in store.list(f"{root}/")]
    if not keys:
        raise TitaError(f"no run {run!r}", where=store.uri, remedy="see `tita runs list`")
    manifest = store.read_manifest(root)
    facts = _json(store, f"{root}/run.json") if f"{root}/run.json" in keys else {}
    recipe = (manifest.meta if manifest else facts).get("recipe") or {}
    curve = list(read_curve(store, run)) if f"{root}/train.jsonl" in keys else []
    pointer = read_pointer(store, CURRENT)
    return RunRecord(
        run=run,
        done=manifest is not None,
        promoted=pointer is not None and pointer.target == f"{root}/model",
        recipe=recipe,
        progress=curve[-1] if curve else None,
        checkpoints=_checkpoints(run, keys),
        facts=facts,
    )


def read_curve(store: Store, run: str) -> Iterator[TrainProgress]:
    """The run's progress records, one a logging step; after a restart the later one counts."""
    by_step: dict[int, TrainProgress] = {}
    for line in store.get(f"runs/{run}/train.jsonl").decode().splitlines():
        if progress := read_progress(line):
            by_step[progress.step] = progress
    yield from (by_step[step] for step in sorted(by_step))


def compare(store: Store, runs: list[str]) -> list[dict[str, Any]]:
    """What differs between runs, one row a key of the recipe or figure of the last step."""
    records = [read_run(store, run) for run in runs]
    rows = []
    for key in sorted({key for record in records for key in record.recipe}):
        values = [record.recipe.get(key) for record in records]
        if any(value != values[0] for value in values):
            rows.append({"": key} | dict(zip(runs, values, strict=True)))
    for key in ("step", "loss", "reward_margin", "reward_accuracy", "samples_per_s"):
        values = [getattr(record.progress, key, None) for record in records]
        rows.append({"": key} | dict(zip(runs, values, strict=True)))
    return rows


def last_checkpoint(run: str, *, store: str) -> str | None:
    """The run's newest whole checkpoint; None if there is none, or the store is not to be seen.

    A watcher often has no rights in the store: that is no reason to say nothing else.
    """
    try:
        opened = open_store(store)
        keys = [info.key for info in opened.list(f"runs/{run}/checkpoints/")]
        found = _checkpoints(run, keys)
    except TitaError:
        return None
    return f"{opened.uri}/runs/{run}/checkpoints/{found[-1]}" if found else None


def promote(store: Store, run: str) -> Pointer:
    """Let `reward/current` lead to this run's model; where it led before is kept.

    Raises:
        TitaError: the run is not whole, or holds no model.
    """
    manifest = store.read_manifest(f"runs/{run}")
    if manifest is None:
        read_run(store, run)
        raise TitaError(
            "not whole: the run has not ended well", where=f"runs/{run}", remedy="wait for its end"
        )
    if not any(file.path == "model/config.json" for file in manifest.files):
        raise TitaError("holds no model", where=f"runs/{run}", remedy="name a run of train-dpo")
    return _move(store, f"runs/{run}/model")


def rollback(store: Store) -> Pointer:
    """Let `reward/current` lead where it led before the last promotion.

    Raises:
        TitaError: there is no earlier pointer.
    """
    now = read_pointer(store, CURRENT)
    if now is None or now.previous is None:
        raise TitaError("nothing to go back to", where=f"{store.uri}/{CURRENT}")
    before = read_pointer(store, now.previous)
    if before is None:
        raise TitaError("the earlier pointer is gone", where=f"{store.uri}/{now.previous}")
    write_pointer(store, CURRENT, before)
    return before


def _move(store: Store, target: str) -> Pointer:
    now = read_pointer(store, CURRENT)
    if now is not None and now.target == target:
        return now
    moved = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    previous = None
    if now is not None:
        previous = f"{_PAST}{now.moved.replace(':', '')}-{time.time_ns() % 10**9:09d}.json"
        write_pointer(store, previous, now)
    pointer = Pointer(target=target, moved=moved, previous=previous)
    write_pointer(store, CURRENT, pointer)
    return pointer


def _checkpoints(run: str, keys: list[str]) -> tuple[str, ...]:
    """Names of whole checkpoints, oldest first: `checkpoint-100` before `checkpoint-1000`."""
    root = f"runs/{run}/checkpoints/"
    names = {key.removeprefix(root).split("/")[0] for key in keys if key.startswith(root)}
    whole = [name for name in names if f"{root}{name}/manifest.json" in keys]
    return tuple(sorted(whole, key=lambda name: (len(name), name)))


def _json(store: Store, key: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(store.get(key))
    except ValueError:
        raise TitaError("not JSON", where=f"{store.uri}/{key}") from None
    return found


_RESTARTED = "kubectl.kubernetes.io/restartedAt"


def roll_inference(cluster: "Cluster", *, release: str | None = None) -> list[str]:
    """Restart the release's inference Deployments as `kubectl rollout restart` does.

    Returns:
        Their names; none where inference is not installed.

    Raises:
        TitaError: several releases serve and none is named.
    """
    selector = "app.kubernetes.io/component=inference"
    selector += f",{INSTANCE_LABEL}={release}" if release else ",app.kubernetes.io/name=tita"
    found, _ = cluster.list(cluster.path("deployments.apps"), labelSelector=selector)
    releases = sorted({item["metadata"]["labels"].get(INSTANCE_LABEL, "?") for item in found})
    if len(releases) > 1:
        raise TitaError(
            f"{len(releases)} releases serve",
            remedy=f"give --release {' or --release '.join(releases)}",
        )
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    change = {"spec": {"template": {"metadata": {"annotations": {_RESTARTED: stamp}}}}}
    for item in found:
        cluster.patch(cluster.path("deployments.apps", item["metadata"]["name"]), change)
    return [item["metadata"]["name"] for item in found]
