"""Follows one run to its end."""

import queue
import re
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass

from tita.errors import ExitCode, TitaError, Unreachable
from tita.launch.cluster import ApiError, Cluster
from tita.launch.display import Display, open_display
from tita.launch.jobs import cancel, list_workloads, run_not_found
from tita.launch.objects import (
    JOB_NAME,
    ListEvent,
    in_queue,
    main_container,
    plain_environment,
    rank_of,
    terminated,
)
from tita.launch.reasons import RunOutcome, RunReason, run_outcome
from tita.launch.run_state import EVENTS, JOBS, OVER, PODS, WORKLOADS, RunSnapshot, RunState
from tita.launch.watch import Change, ConnectionEvent, Informer, LogStream, WatchForbidden, tail_log
from tita.records import read_progress
from tita.terminal import Output, say


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    pod: str
    rank: int
    text: str


class Follower:
    """Follows a run; `watch` returns when it is over."""

    def __init__(
        self,
        cluster: Cluster,
        run: str,
        view: Display,
        *,
        all_ranks: bool = False,
        queue_every_s: float = 10.0,
    ) -> None:
        self._first = cluster
        # Feeds and tails try again for ever by themselves, and say so once.
        self._cluster = cluster.without_retries()
        self._view = view
        self._all_ranks = all_ranks
        self._state = RunState(run=run)
        self._inbox: queue.SimpleQueue[Change | _Line | RunReason] = queue.SimpleQueue()
        self._tails: dict[str, LogStream] = {}
        self._recent: dict[str, deque[str]] = {}
        self._said: set[str] = set()
        self._away: set[str] = set()
        self._queue_every_s = queue_every_s
        self._halt = threading.Event()
        self._last_line_at = 0.0
        self._clock_gap_s = time.time() - time.monotonic()

    def watch(self) -> RunOutcome:
        """Show the run until it is over.

        Raises:
            TitaError: there is no such run, or it must not be looked at.
            Unreachable: the API gave no answer from the start; once it did, it is waited for.
            KeyboardInterrupt: let go; call `close` on the view.
        """
        self._look_once()
        feeds = self._start_feeds()
        try:
            while True:
                self._take()
                if not {JOBS, PODS} <= self._state.listed:
                    continue
                if self._state.last_job is None:
                    raise run_not_found(self._cluster, self._state.run)
                self._notice_sleep()
                self._start_tails()
                snapshot = self._state.snapshot()
                self._view.update(snapshot)
                for reason in snapshot.reasons:
                    self._say_once(reason)
                if snapshot.phase in OVER:
                    return self._end()
        finally:
            self._halt.set()
            for feed in feeds:
                feed.stop()
            for tail in self._tails.values():
                tail.stop()

    def _look_once(self) -> None:
        """Whether there is a cluster at all; what else is wrong, the feeds will meet and tell."""
        try:
            self._first.get(self._first.path(JOBS, self._state.run))
        except ApiError as error:
            if error.status == 404:
                raise run_not_found(self._first, self._state.run) from None

    def _start_feeds(self) -> list[Informer]:
        run = self._state.run
        asked = {
            JOBS: {"fieldSelector": f"metadata.name={run}"},
            PODS: {"labelSelector": f"{JOB_NAME}={run}"},
            EVENTS: {},
        }
        feeds = [
            Informer(self._cluster, kind, params=params, sink=self._inbox.put)
            for kind, params in asked.items()
        ]
        for feed in feeds:
            feed.start()
        threading.Thread(target=self._poll_queue, daemon=True).start()
        return feeds

    def _poll_queue(self) -> None:
        """Kueue's workloads, while the Job waits in a queue: few may watch them."""
        while not self._halt.wait(self._queue_every_s / 10):
            job = self._state.job
            if job is None or not in_queue(job):
                continue
            try:
                found = list_workloads(self._cluster)
                self._inbox.put(ListEvent(kind=WORKLOADS, items=tuple(found)))
            except Unreachable:
                pass
            self._halt.wait(self._queue_every_s)

    def _take(self, *, wait_s: float = 0.5) -> None:
        """Take in what came, and what more came while that was done."""
        try:
            self._accept(self._inbox.get(timeout=wait_s))
            while True:
                self._accept(self._inbox.get_nowait())
        except queue.Empty:
            return

    def _accept(self, item: Change | _Line | RunReason) -> None:
        if isinstance(item, _Line):
            self._accept_line(item)
        elif isinstance(item, RunReason):
            self._say_once(item)
        elif isinstance(item, ConnectionEvent):
            self._tell_away(item)
        elif isinstance(item, WatchForbidden):
            if item.kind == JOBS:
                raise item.error
            self._state.listed.add(item.kind)
            self._view.say(f"cannot watch {item.kind}: {item.error.what}")
        else:
            self._state.apply(item)

    def _accept_line(self, line: _Line) -> None:
        self._last_line_at = time.monotonic()
        progress = read_progress(line.text)
        if progress is None:
            self._recent.setdefault(line.pod, deque(maxlen=20)).append(line.text)
            self._view.line(str(line.rank), line.text)
        elif line.rank == 0:
            self._state.progress = progress

    def _tell_away(self, item: ConnectionEvent) -> None:
        before = bool(self._away)
        (self._away.discard if item.back else self._away.add)(item.kind)
        if self._away and not before:
            self._view.say(f"{item.why}; the job goes on, and so will this view")
        elif before and not self._away:
            self._view.say("the cluster's API answers again")

    def _notice_sleep(self) -> None:
        gap_s = time.time() - time.monotonic()
        slept_s = gap_s - self._clock_gap_s
        self._clock_gap_s = gap_s
        if slept_s > 30:
            self._view.say(f"this machine slept for {slept_s / 60:.0f} min; catching up")

    def _start_tails(self) -> None:
        for uid, pod in self._state.pods.items():
            rank, name = rank_of(pod), pod["metadata"]["name"]
            if uid in self._tails or not (self._all_ranks or rank == 0):
                continue

            def put(text: str, rank: int = rank, name: str = name) -> None:
                self._inbox.put(_Line(pod=name, rank=rank, text=text))

            def tell(text: str, name: str = name) -> None:
                # What keeps one pod's log from us most often keeps all of them.
                key = re.sub(r"\S*\d\S*", "#", text.replace(name, ""))
                self._inbox.put(RunReason(key=key, text=text))

            self._tails[uid] = LogStream(self._cluster, name, sink=put, tell=tell)
            self._tails[uid].start()

    def _say_once(self, reason: RunReason) -> None:
        if reason.key not in self._said:
            self._said.add(reason.key)
            self._view.say(reason.text)

    def _end(self) -> RunOutcome:
        """The last lines of all logs may still be on their way, and the last pods' states."""
        self._last_line_at = time.monotonic()
        while time.monotonic() - self._last_line_at < 5.0:
            self._start_tails()
            self._take(wait_s=0.2)
            if not any(tail.is_alive() for tail in self._tails.values()) and self._inbox.empty():
                break
        self._view.update(self._state.snapshot())
        state = self._state
        return run_outcome(state.job, state.pods.values(), run=state.run, has_logs=state.has_logs)

    def explain(self, verdict: RunOutcome) -> None:
        """Tell how the run ended, with the last lines of the pod that says why."""
        for line in verdict.lines:
            self._view.say(line)
        if verdict.pod is not None:
            for line in self._last_lines(verdict.pod):
                self._view.say(f"    {line}")
        if verdict.code != ExitCode.OK:
            self._tell_checkpoint()
        for remedy in verdict.remedies:
            self._view.say(f"  - {remedy}")

    def _last_lines(self, pod: str, *, count: int = 12) -> list[str]:
        # Among progress lines, which are for this program, there is little else in the last few.
        lines = tail_log(self._cluster, pod, count=20 * count)
        if lines := [line for line in lines if read_progress(line) is None]:
            return lines[-count:]
        if pod in self._recent:
            return list(self._recent[pod])[-count:]
        for found in self._state.pods.values():
            if found["metadata"]["name"] == pod:
                return str((terminated(found) or {}).get("message") or "").splitlines()[-count:]
        return []

    def _tell_checkpoint(self) -> None:
        from tita.launch.runs import last_checkpoint

        if self._state.last_job is None:
            return
        pod = self._state.last_job["spec"]["template"]
        store = plain_environment(main_container(pod)).get("TITA_STORE", "")
        found = last_checkpoint(self._state.run, store=store)
        if found:
            self._view.say(f"last complete checkpoint: {found}")


# How long a second Ctrl-C counts as one.
_SECOND_S = 2.0


def watch_run(
    cluster: Cluster, run: str, *, output: Output = Output.TABLE, all_ranks: bool = False
) -> int:
    """Show a run until it is over and return its exit code; 130 when the user lets go of it."""
    view = open_display(output)
    follower = Follower(cluster, run, view, all_ranks=all_ranks)
    return _follow(cluster, run, follower, view)


def print_logs(cluster: Cluster, run: str, *, all_ranks: bool = False) -> int:
    """Print a run's log to standard output until the run is over."""
    view = _LogDisplay(prefixed=all_ranks)
    return _follow(cluster, run, Follower(cluster, run, view, all_ranks=all_ranks), view)


def _follow(cluster: Cluster, run: str, follower: Follower, view: Display) -> int:
    try:
        verdict = follower.watch()
        view.close()
        follower.explain(verdict)
        return verdict.code
    except ApiError as error:
        error.what = f"cannot watch {run}, which goes on all the same: {error.what}"
        raise
    except KeyboardInterrupt:
        view.close()
        return _let_go(cluster, run)
    finally:
        view.close()


def _let_go(cluster: Cluster, run: str) -> int:
    try:
        say(f"let go of {run}; it goes on. Come back with: tita jobs watch {run}")
        if sys.stdin.isatty():
            say("Ctrl-C again to cancel it")
            time.sleep(_SECOND_S)
    except KeyboardInterrupt:
        _offer_to_cancel(cluster, run)
    return ExitCode.INTERRUPTED


def _offer_to_cancel(cluster: Cluster, run: str) -> None:
    try:
        print(f"\ncancel {run}? Its checkpoints stay. [y/N] ", end="", file=sys.stderr, flush=True)
        answer = sys.stdin.readline()
    except KeyboardInterrupt:
        return
    if answer.strip().lower() in ("y", "yes"):
        try:
            say(cancel(cluster, run))
        except TitaError as error:
            say(str(error))


class _LogDisplay:
    """The job's own lines on standard output, whatever else there is on standard error."""

    def __init__(self, *, prefixed: bool) -> None:
        self._prefixed = prefixed

    def update(self, snapshot: RunSnapshot) -> None:
        return

    def say(self, text: str) -> None:
        say(text)

    def line(self, source: str, text: str) -> None:
        print(f"{source}| {text}" if self._prefixed else text, flush=True)

    def close(self) -> None:
        return
