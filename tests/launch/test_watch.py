"""Informers and log streams: no event or line is missed or repeated."""

import itertools
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fake_api import FakeApi, Refusal

from tita.launch import watch
from tita.launch.cluster import ApiError, Cluster
from tita.launch.objects import ListEvent, WatchEvent
from tita.launch.watch import (
    ConnectionEvent,
    Informer,
    InformerEvent,
    LogPosition,
    LogStream,
    WatchForbidden,
)


def feed(lab: Any, kind: str = "pods") -> tuple[Informer, list[InformerEvent]]:
    seen: list[InformerEvent] = []
    thread = Informer(lab.cluster, kind, params={}, sink=seen.append, wait_s=(0.02, 0.1))
    thread.start()
    lab.until(lambda: any(isinstance(change, ListEvent) for change in seen))
    return thread, seen


def known(changes: list[InformerEvent]) -> set[str]:
    """The names of objects that exist after these events."""
    names: set[str] = set()
    for change in list(changes):
        if isinstance(change, ListEvent):
            names = {item["metadata"]["name"] for item in change.items}
        elif isinstance(change, WatchEvent):
            name = change.item["metadata"]["name"]
            (names.discard if change.deleted else names.add)(name)
    return names


def there(api: FakeApi) -> set[str]:
    return {name for resource, _, name in api.objects if resource == "pods"}


def test_no_event_is_missed_when_watches_time_out(lab: Any) -> None:
    lab.api.longest_watch_s = 0.15
    thread, seen = feed(lab)
    for number in range(20):
        lab.api.pod("r", number)
        if number % 3 == 0:
            lab.api.remove("pods", f"r-{number}-abcde")
    lab.until(lambda: known(seen) == there(lab.api))
    thread.stop()
    assert sum("watch=true" in line for line in lab.api.requests) >= 1
    assert sum(isinstance(change, ListEvent) for change in seen) == 1


def test_expired_version_leads_to_a_new_list(lab: Any) -> None:
    lab.api.longest_watch_s = 0.1
    lab.api.pod("r", 0)
    thread, seen = feed(lab)
    lab.api.refusals.append(Refusal(410, "Expired", "too old"))
    lab.api.pod("r", 1)
    lab.api.remove("pods", "r-0-abcde")
    lab.api.compact()
    lab.until(lambda: sum(isinstance(change, ListEvent) for change in seen) >= 2)
    lab.until(lambda: known(seen) == there(lab.api) == {"r-1-abcde"})
    thread.stop()


def test_no_event_is_missed_when_connections_break(lab: Any) -> None:
    thread, seen = feed(lab)
    for number in range(6):
        lab.api.pod("r", number)
        lab.api.cut()
    lab.api.stop()
    lab.until(
        lambda: any(isinstance(change, ConnectionEvent) and not change.restored for change in seen)
    )
    lab.api.pod("r", 7)
    lab.api.start()
    lab.until(lambda: known(seen) == there(lab.api))
    thread.stop()
    told = [change.restored for change in seen if isinstance(change, ConnectionEvent)]
    assert told == [False, True] * (len(told) // 2)


def test_forbidden_watch_ends_the_informer(lab: Any) -> None:
    lab.api.denied.add(("list", "pods"))
    seen: list[InformerEvent] = []
    thread = Informer(lab.cluster, "pods", params={}, sink=seen.append)
    thread.start()
    thread.join(timeout=60)
    assert isinstance(seen[-1], WatchForbidden)


def test_an_api_server_that_restarts_may_refuse_for_a_while(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it knows the cluster's roles. Afterwards a refusal is final."""
    thread, seen = feed(lab)
    pod = lab.api.pod("r", node="node-1")
    log, lines = tail(lab, pod)
    lab.api.write(pod, "before")
    lab.until(lambda: lines)
    refused = {("list", "pods"), ("watch", "pods"), ("get", "pods"), ("get", "pods/log")}
    lab.api.denied |= refused
    lab.api.cut()
    lab.until(lambda: isinstance(seen[-1], ConnectionEvent))
    lab.api.denied -= refused
    other = lab.api.pod("r", 1)
    lab.api.write(pod, "after")
    lab.until(lambda: other in known(seen) and lines == ["before", "after"])
    assert thread.is_alive()
    log.stop()
    monkeypatch.setattr(watch, "_RESTART_S", 0.0)
    lab.api.denied |= refused
    lab.api.cut()
    thread.join(timeout=10)
    assert isinstance(seen[-1], WatchForbidden)


def test_lists_come_in_pages(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tita.launch.cluster.PAGE", 7)
    for number in range(30):
        lab.api.pod("r", number)
    before = len(lab.api.requests)
    items, version = lab.cluster.list(lab.cluster.path("pods"))
    assert len(items) == 30
    assert len(lab.api.requests) - before == 5
    assert int(version) == lab.api.version


def test_expired_continue_token_restarts_the_list(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tita.launch.cluster.PAGE", 7)
    for number in range(10):
        lab.api.pod("r", number)
    ask = Cluster._call
    pages: list[Any] = []

    def call(self: Cluster, *arguments: Any, **more: Any) -> Any:
        pages.append(more)
        if len(pages) == 2:
            raise ApiError(410, "Expired", "the continue token is too old", where="pods")
        return ask(self, *arguments, **more)

    monkeypatch.setattr(Cluster, "_call", call)
    items, _ = lab.cluster.list(lab.cluster.path("pods"))
    assert len({item["metadata"]["name"] for item in items}) == 10


# Logs.


def tail(lab: Any, pod: str) -> tuple[LogStream, list[str]]:
    lines: list[str] = []
    thread = LogStream(lab.cluster, pod, sink=lines.append, notify=pytest.fail, wait_s=0.02)
    thread.start()
    return thread, lines


def test_log_of_a_pod_that_starts_later(lab: Any) -> None:
    pod = lab.api.pod("r")
    thread, lines = tail(lab, pod)
    lab.api.waiting(pod, "ContainerCreating")
    lab.api.run_pod(pod)
    lab.api.write(pod, "one", "two", "", "two")
    lab.api.end_pod(pod, 0)
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert lines == ["one", "two", "", "two"]


def test_no_line_is_lost_or_repeated_when_connections_break(lab: Any) -> None:
    pod = lab.api.pod("r", node="node-1")
    thread, lines = tail(lab, pod)
    expected = []
    for number in range(60):
        # Equal lines are not repeats.
        text = f"line {number // 2}"
        expected.append(text)
        lab.api.write(pod, text)
        if number % 10 == 5:
            lab.until(lambda: len(lines) > 2)
            lab.api.cut()
    lab.api.end_pod(pod, 0)
    thread.join(timeout=60)
    assert lines == expected


def test_log_continues_in_the_restarted_container(lab: Any) -> None:
    pod = lab.api.pod("r", node="node-1")
    found = lab.api.get("pods", pod)
    found["spec"]["restartPolicy"] = "OnFailure"
    lab.api.put("pods", found)
    thread, lines = tail(lab, pod)
    lab.api.write(pod, "first life")
    lab.until(lambda: lines)
    with lab.api.changed:  # written, and the container gone, before anyone could look
        lab.api.write(pod, "last word")
        lab.api.restart(pod)
    lab.api.write(pod, "second life")
    lab.until(lambda: "second life" in lines)
    lab.api.container(pod, {"terminated": {"exitCode": 0}}, restarts=1)
    lab.api.end_pod(pod, 0)
    thread.join(timeout=60)
    assert lines == ["first life", "last word", "second life"]


class Pauses(threading.Event):
    """Records the waits of a log stream and does not wait."""

    def __init__(self, *, stop_after: int) -> None:
        super().__init__()
        self.stop_after = stop_after
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout or 0.0)
        if len(self.seconds) == self.stop_after:
            self.set()
        return self.is_set()


def paused_tail(lab: Any, pod: str, *, stop_after: int) -> tuple[list[str], list[float]]:
    """The lines of a log stream that ends after so many waits, and these."""
    lines: list[str] = []
    thread = LogStream(lab.cluster, pod, sink=lines.append, notify=lines.append)
    thread._stopped = pauses = Pauses(stop_after=stop_after)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive()
    return lines, pauses.seconds


def test_streams_that_end_at_once_are_opened_more_and_more_seldom(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy or an API server may end them all; a stream that lasts resets the wait."""
    pod = lab.api.pod("r", node="node-1")
    lab.api.write(pod, "one", "two")
    lab.api.ends_logs_at_once = True
    clock: Iterator[float] = itertools.repeat(0.0)
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    lines, pauses = paused_tail(lab, pod, stop_after=9)
    assert lines == ["one", "two"]
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    # Each stream lasts two seconds.
    clock = itertools.count(0.0, 2.0)
    assert paused_tail(lab, pod, stop_after=3)[1] == [0.05, 0.05, 0.05]


def test_an_overloaded_api_says_when_to_read_logs_again(lab: Any) -> None:
    pod = lab.api.pod("r", node="node-1")
    lab.api.write(pod, "one")
    refusal = Refusal(429, "TooManyRequests", "too many requests", retry_after=17)
    lab.api.log_refusals.append(refusal)
    lab.api.end_pod(pod, 0)
    lines, pauses = paused_tail(lab, pod, stop_after=5)
    assert (lines, pauses) == (["one"], [17.0])


def test_unavailable_logs_are_reported_once_and_read_later(lab: Any) -> None:
    lab.submit(gpus=8)
    pods = [lab.api.pod("r", rank, node=f"node-{rank + 1}") for rank in range(2)]
    words = 'Get "https://10.0.0.{}:10250/containerLogs": dial tcp: connection refused'
    lab.api.log_refusals += [
        Refusal(500, "InternalError", words.format(number)) for number in range(8)
    ]
    view = lab.watch(all_ranks=True)
    lab.until(lambda: "logs are unavailable" in view.text)
    for pod in pods:
        lab.api.write(pod, f"all of {pod}")
        lab.api.end_pod(pod, 0)
    lab.until(lambda: len(view.lines) == 2)
    lab.api.job_over("r", "Complete")
    lab.outcome()
    assert {text for _, text in view.lines} == {f"all of {pod}" for pod in pods}
    assert sum("dial tcp: connection refused" in line for line in view.said) == 1


def test_forbidden_logs_are_reported(lab: Any) -> None:
    lab.submit(gpus=8)
    lab.api.denied.add(("get", "pods/log"))
    pods = [lab.api.pod("r", rank, node=f"node-{rank + 1}") for rank in range(2)]
    view = lab.watch(all_ranks=True)
    lab.until(lambda: "cannot read logs: pods/log is forbidden" in view.text)
    for pod in pods:
        lab.api.end_pod(pod, 0)
    lab.api.job_over("r", "Complete")
    lab.outcome()
    assert sum("cannot read logs" in line for line in view.said) == 1


def test_deleted_pod_ends_its_log(lab: Any) -> None:
    pod = lab.api.pod("r", node="node-1")
    thread, lines = tail(lab, pod)
    lab.api.write(pod, "alive")
    lab.until(lambda: lines)
    lab.api.remove("pods", pod)
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_lines_stamped_out_of_order_are_kept() -> None:
    """Two output streams of one container may be stamped out of order."""
    log = [f"2026-01-01T00:00:0{s}.{n}Z line {s}{n}" for s, n in ((1, 5), (1, 2), (2, 9), (2, 1))]
    every = [c for n in range(4) for c in itertools.combinations(range(len(log)), n)]
    for cuts in every:
        seen = LogPosition()
        taken: list[str | None] = []
        for cut in [*cuts, len(log)]:
            since = seen.reopen().get("sinceTime", "")[:19]
            replay = [line for line in log if line[:19] >= since][
                : None if cut == len(log) else cut
            ]
            taken += [seen.take(line) for line in replay]
        assert sorted(line for line in taken if line) == sorted(
            line.partition(" ")[2] for line in log
        ), cuts


def test_several_log_streams(lab: Any) -> None:
    pod = lab.api.pod("r", node="node-1")
    tails = [tail(lab, pod) for _ in range(8)]
    writer = threading.Thread(target=lambda: lab.api.write(pod, *map(str, range(200))))
    writer.start()
    writer.join()
    lab.api.end_pod(pod, 0)
    for thread, lines in tails:
        thread.join(timeout=60)
        assert lines == [str(number) for number in range(200)]
