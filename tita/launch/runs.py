"""Training runs in the store, and the promoted one."""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from tita.errors import DamagedData, TitaError
from tita.records import (
    TrainProgress,
    ValidationFigures,
    complete_checkpoints,
    read_progress,
    read_validation,
)
from tita.storage import Store, open_store
from tita.storage.locate import read_pointer, store_command, trackers_key
from tita.storage.store import read_file
from tita.storage.waits import checked_while_waiting
from tita.terminal import say

HELD_OUT = (
    *("step", "loss", "accuracy", "margin", "other_loss", "other_accuracy", "other_margin"),
    *("image_effect", "image_effect_low", "image_effect_high"),
)
"""Figures of the held-out pairs, in the order of tables."""
CURRENT = "reward/current"
"""Key of the pointer to the promoted reward model."""
_STORE_PATIENCE_S = 5.0
"""A checkpoint is not worth a longer wait for a store that does not answer."""


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

    @property
    def held_out(self) -> ValidationFigures | None:
        """Figures of the held-out pairs: of the weights that were kept, or the newest."""
        names = {field.name for field in fields(ValidationFigures)}
        found = self.facts.get("validation") or {}
        if names <= found.keys():
            return read_validation({name: found[name] for name in names})
        return self.progress.validation if self.progress else None

    def row(self) -> dict[str, Any]:
        """The columns of `tita runs list`."""
        last = self.progress
        held_out = self.held_out
        return {
            "run": self.run,
            "state": "done" if self.done else "open",
            "step": f"{last.step}/{last.steps}" if last else None,
            "loss": significant(last.loss) if last else None,
            "margin": significant(last.reward_margin) if last else None,
            "accuracy": significant(last.reward_accuracy) if last else None,
            "held_out": significant(held_out.accuracy) if held_out else None,
            "image": significant(held_out.image_effect) if held_out else None,
            "promoted": "yes" if self.promoted else None,
            "release": self.facts.get("release"),
            "namespace": self.facts.get("namespace"),
        }


def significant(value: Any) -> Any:
    """A float with four significant digits, for tables; any other value unchanged."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def list_runs(store: Store) -> list[RunRecord]:
    """All runs by name, complete or not; one with damaged files is reported and left out."""
    names = {info.key.split("/")[1] for info in store.list("runs/") if info.key.count("/") >= 2}
    found = []
    for name in sorted(names):
        try:
            found.append(read_run(store, name))
        except DamagedData as error:
            say(f"skipped {error}")
    return found


def read_run(store: Store, run: str) -> RunRecord:
    """One run.

    Raises:
        TitaError: the store has no file of it.
        DamagedData: its manifest or `run.json` is damaged.
    """
    root = f"runs/{run}"
    keys = [info.key for info in store.list(f"{root}/")]
    if not keys:
        command = store_command("runs list", store=store.uri)
        raise TitaError(f"no run {run!r}", where=store.uri, remedy=f"see `{command}`")
    manifest = store.read_manifest(root)
    facts: dict[str, Any] = {}
    if (data := read_file(store, root, "run.json", manifest=manifest)) is not None:
        try:
            facts = json.loads(data)
        except ValueError:
            raise DamagedData("not JSON", where=f"{store.uri}/{root}/run.json") from None
    recipe = (manifest.meta if manifest else facts).get("recipe") or {}
    curve = list(read_curve(store, run))
    pointer = read_pointer(store, CURRENT)
    return RunRecord(
        run=run,
        done=manifest is not None,
        promoted=pointer is not None and pointer.target == f"{root}/model",
        recipe=recipe,
        progress=curve[-1] if curve else None,
        checkpoints=tuple(map(str, reversed(_checkpoints(run, keys)))),
        facts=facts,
    )


def read_trackers(store: Store, run: str) -> dict[str, str]:
    """Links to the run in experiment trackers, by tracker; there from the start of training on."""
    key = trackers_key(f"runs/{run}")
    if not store.exists(key):
        return {}
    try:
        trackers = json.loads(store.get(key))["trackers"]
        return {name: str(link["url"]) for name, link in trackers.items()}
    except (ValueError, KeyError, TypeError):
        raise TitaError(
            "not the links of a run",
            where=f"{store.uri}/{key}",
            remedy="delete the object: the run itself does not depend on it",
        ) from None


def read_curve(store: Store, run: str) -> Iterator[TrainProgress]:
    """The run's progress records in order of steps; of a repeated step, the last one."""
    tree = f"runs/{run}"
    data = read_file(store, tree, "train.jsonl", manifest=store.read_manifest(tree)) or b""
    by_step: dict[int, TrainProgress] = {}
    for line in data.decode().splitlines():
        if progress := read_progress(line):
            by_step[progress.step] = progress
    yield from (by_step[step] for step in sorted(by_step))


def compare(store: Store, runs: list[str]) -> list[dict[str, Any]]:
    """Rows of `tita runs compare`: recipe keys that differ, and figures of the last step."""
    records = [read_run(store, run) for run in runs]
    rows = []
    for key in sorted({key for record in records for key in record.recipe}):
        values = [record.recipe.get(key) for record in records]
        if any(value != values[0] for value in values):
            rows.append({"": key} | dict(zip(runs, values, strict=True)))
    for key in ("step", "loss", "reward_margin", "reward_accuracy", "samples_per_s"):
        values = [significant(getattr(record.progress, key, None)) for record in records]
        rows.append({"": key} | dict(zip(runs, values, strict=True)))
    held_out = [record.held_out for record in records]
    for name in HELD_OUT if any(held_out) else ():
        values = [significant(getattr(figures, name, None)) for figures in held_out]
        rows.append({"": f"held_out.{name}"} | dict(zip(runs, values, strict=True)))
    return rows


def evaluations(curve: Iterable[TrainProgress]) -> list[dict[str, Any]]:
    """Rows of `tita runs show`: the held-out pairs' figures at each step of an evaluation.

    `other images` is their accuracy under other images; then its difference and 95 % interval.
    """
    found = {step.validation.step: step.validation for step in curve if step.validation}
    return [
        {
            "step": figures.step,
            "loss": significant(figures.loss),
            "margin": significant(figures.margin),
            "accuracy": significant(figures.accuracy),
            "other images": significant(figures.other_accuracy),
            "difference": significant(figures.image_effect),
            "from": significant(figures.image_effect_low),
            "to": significant(figures.image_effect_high),
        }
        for figures in found.values()
    ]


def last_checkpoint(run: str, *, store: str, num_nodes: int | None = None) -> str | None:
    """The run's newest complete checkpoint; empty if it has none, None if the store is unreadable.

    Users who watch runs often have no credentials for the store, or it answers inside of the
    cluster only.
    """
    ends_at = time.monotonic() + _STORE_PATIENCE_S

    def check() -> None:
        if time.monotonic() > ends_at:
            raise TitaError("the store does not answer", where=store)

    try:
        opened = open_store(store)
        with checked_while_waiting(check):
            keys = [info.key for info in opened.list(f"runs/{run}/checkpoints/")]
        found = _checkpoints(run, keys, num_nodes=num_nodes)
    except TitaError:
        return None
    return f"{opened.uri}/runs/{run}/checkpoints/{found[0]}" if found else ""


def _checkpoints(run: str, keys: list[str], *, num_nodes: int | None = None) -> list[int]:
    root = f"runs/{run}/checkpoints/"
    paths = (key.removeprefix(root) for key in keys if key.startswith(root))
    return complete_checkpoints(paths, num_nodes=num_nodes)
