"""Reports what all ranks of a run do: workers record their stage, the first node logs all of them.

A worker writes its stage into the file that shows its node that it lives. Each node reads those of
its workers; the first node collects them through the rendezvous store and prints one line when they
change, so that one log tells what the whole run does.
"""

import json
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tita.activity import Stage, current_stage
from tita.gang.rendezvous import rendezvous_store
from tita.records import RankStage, RunStages
from tita.settings import Settings
from tita.terminal import counted

_POLL_S = 1.0
_PROGRESS_EVERY_S = 5.0
"""Seconds between two reports of stages that are the same but for their progress."""
_DIFFERENCE_S = 3.0
"""Ranks that differ for less time are not reported: stages of other nodes arrive later."""
_STORE_TIMEOUT_S = 10.0
_KEY = "tita/stages"


def to_text(stage: Stage, *, rank: int) -> str:
    """The stage of one rank, as it is written into its file."""
    return json.dumps({**asdict(stage), "ranks": [rank]})


class StageReporter:
    """Reports this node's stages from a thread while its block runs, on the first node all."""

    def __init__(self, folder: Path | None, *, settings: Settings) -> None:
        """`folder` has one file per worker, with its stage; None reports this process alone."""
        self._folder = folder
        self._settings = settings
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stages", daemon=True)
        self._found: dict[Path, RankStage] = {}
        self._store: Any = None
        self._reported: tuple[RankStage, ...] = ()
        self._reported_at = float("-inf")
        self._differ_since: float | None = None
        """When the stages began to differ from those reported; None while they are alike."""

    def __enter__(self) -> "StageReporter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        # It may wait for a node that is gone.
        self._thread.join(timeout=2 * _POLL_S)

    def _watch(self) -> None:
        while True:
            own = self._own_stages()
            if self._settings.num_nodes > 1 and self._found:
                own = self._exchange(own)
            if self._settings.node_rank == 0 and own:
                self._report(merge(own))
            if self._stopped.wait(_POLL_S):
                return

    def _own_stages(self) -> list[RankStage]:
        if self._folder is None:
            stage = current_stage()
            return [] if stage is None else [_from_text(to_text(stage, rank=0))]
        for path in self._folder.glob("*"):
            # A worker may be writing it.
            with suppress(OSError, ValueError, TypeError, KeyError):
                self._found[path] = _from_text(path.read_text())
        if self._found:
            return list(self._found.values())
        per_node = self._settings.procs_per_node
        first = self._settings.node_rank * per_node
        ranks = tuple(range(first, first + per_node))
        others = self._settings.num_nodes - 1
        name = f"waiting for {counted(others, 'other node')}" if others else "starting"
        return [RankStage(name=name, ranks=ranks)]

    def _exchange(self, own: list[RankStage]) -> list[RankStage]:
        """Publish the stages of this node; on the first node, return those of all nodes."""
        from torch.distributed import DistError

        here, stages = self._settings, list(own)
        try:
            if self._store is None:
                host, port = here.master_addr, here.master_port
                self._store = rendezvous_store(host=host, port=port, timeout_s=_STORE_TIMEOUT_S)
            if here.node_rank != 0:
                self._publish(merge(own))
                return own
            for key in (f"{_KEY}/{node}" for node in range(1, here.num_nodes)):
                if self._store.check([key]):
                    stages += [_from_fields(each) for each in json.loads(self._store.get(key))]
        except DistError:
            # The network is away for a while, or the store has ended with the first node.
            self._store = None
        return stages

    def _publish(self, stages: tuple[RankStage, ...]) -> None:
        if stages != self._reported:
            text = json.dumps([asdict(each) for each in stages])
            self._store.set(f"{_KEY}/{self._settings.node_rank}", text)
            self._reported = stages

    def _report(self, stages: tuple[RankStage, ...]) -> None:
        now = time.monotonic()
        if _are_alike(stages, self._reported):
            self._differ_since = None
            if stages == self._reported or now - self._reported_at < _PROGRESS_EVERY_S:
                return
        else:
            if self._differ_since is None:
                self._differ_since = now
            is_mixed = sum(not stage.is_waiting for stage in stages) > 1
            if is_mixed and now - self._differ_since < _DIFFERENCE_S:
                return
        self._reported, self._reported_at, self._differ_since = stages, now, None
        per_node = self._settings.procs_per_node
        print(RunStages(stages=stages, ranks_per_node=per_node).to_line(), flush=True)


def _are_alike(stages: tuple[RankStage, ...], others: tuple[RankStage, ...]) -> bool:
    """Whether they are the same but for their progress."""
    return [(s.name, s.ranks) for s in stages] == [(s.name, s.ranks) for s in others]


def merge(stages: Iterable[RankStage]) -> tuple[RankStage, ...]:
    """One stage per name, with the progress of its slowest rank; in the order of their ranks."""
    by_name: dict[str, RankStage] = {}
    for stage in stages:
        if (other := by_name.get(stage.name)) is not None:
            slowest = min(stage, other, key=lambda each: each.done / (each.total or 1))
            ranks = tuple(sorted({*stage.ranks, *other.ranks}))
            stage = RankStage(**asdict(slowest) | {"ranks": ranks})
        by_name[stage.name] = stage
    return tuple(sorted(by_name.values(), key=lambda each: each.ranks))


def _from_text(text: str) -> RankStage:
    return _from_fields(json.loads(text))


def _from_fields(fields: dict[str, Any]) -> RankStage:
    return RankStage(**fields | {"ranks": tuple(fields["ranks"])})
