"""Objects of one kind, kept up to date: list, then watch from there, and again after any break.

As the official clients' informers do it: no change is missed, because a watch goes on from the
last resourceVersion seen, and where the server no longer knows that one (410 Gone) a new list says
what is there and, by what it lacks, what went.
https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes
"""

import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tita.errors import TitaError, Unreachable
from tita.launch.cluster import ApiError, Cluster, Object


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """All there is, as of now."""

    kind: str
    items: tuple[Object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """One object came, changed or went."""

    kind: str
    item: Object
    gone: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Away:
    """The API gives no answer; the feed tries again. With `back` it does again."""

    kind: str
    why: str = ""
    back: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Denied:
    """The API will never answer this; the feed has ended."""

    kind: str
    error: TitaError


Change = Listed | Changed | Away | Denied


class Feed(threading.Thread):
    """Sends every change of `kind` to `sink`, until stopped."""

    def __init__(
        self,
        cluster: Cluster,
        kind: str,
        *,
        params: Mapping[str, str],
        sink: Callable[[Change], None],
        pause_s: tuple[float, float] = (0.5, 15.0),
    ) -> None:
        super().__init__(daemon=True, name=f"feed {kind}")
        self._cluster = cluster
        self._kind = kind
        self._params = dict(params)
        self._sink = sink
        self._first_pause_s, self._longest_pause_s = pause_s
        self._halt = threading.Event()
        self._away = False
        self._version = ""

    def stop(self) -> None:
        """End soon; the thread may still wait for its last answer."""
        self._halt.set()

    def run(self) -> None:
        pause = self._first_pause_s
        while not self._halt.is_set():
            started = time.monotonic()
            try:
                if not self._version:
                    self._list()
                self._watch()
                pause = self._first_pause_s
            except ApiError as error:
                if error.status == 410:
                    self._version = ""
                    continue
                if error.status in (401, 403, 404, 405):
                    self._sink(Denied(kind=self._kind, error=error))
                    return
                self._lost(error)
            except (Unreachable, ValueError) as error:
                self._lost(error)
                self._halt.wait(getattr(error, "pause_s", 0.0))  # the server's Retry-After
            # A server that ends every watch at once must not be asked in a tight loop.
            if time.monotonic() - started < 1.0:
                self._halt.wait(pause * random.uniform(0.8, 1.2))
                pause = min(2 * pause, self._longest_pause_s)

    def _list(self) -> None:
        items, version = self._cluster.list(self._cluster.path(self._kind), **self._params)
        self._back()
        self._sink(Listed(kind=self._kind, items=tuple(items)))
        self._version = version

    def _watch(self) -> None:
        path = self._cluster.path(self._kind)
        for change in self._cluster.watch(
            path, version=self._version, on_open=self._back, **self._params
        ):
            if self._halt.is_set():
                return
            item = change["object"]
            if change["type"] != "BOOKMARK":
                gone = change["type"] == "DELETED"
                self._sink(Changed(kind=self._kind, item=item, gone=gone))
            self._version = item["metadata"]["resourceVersion"]

    def _lost(self, error: Exception) -> None:
        if not self._away:
            self._away = True
            self._sink(Away(kind=self._kind, why=getattr(error, "what", str(error))))

    def _back(self) -> None:
        if self._away:
            self._away = False
            self._sink(Away(kind=self._kind, back=True))
