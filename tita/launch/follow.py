"""Follows one run to its end: informers and log streams in, a display and an exit code out."""

import queue
import re
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from tita.errors import ExitCode, TitaError, Unreachable
from tita.launch.cluster import ApiError, Cluster
from tita.launch.display import Display, open_display
from tita.launch.jobs import cancel, device_holders, list_workloads, run_not_found
from tita.launch.objects import (
    JOB_NAME,
    ListEvent,
    has_started,
    in_queue,
    main_container,
    plain_environment,
    rank_of,
    terminated,
)
from tita.launch.outcome import RunOutcome, next_steps, run_outcome
from tita.launch.reasons import RunReason
from tita.launch.run_state import EVENTS, JOBS, OVER, PODS, WORKLOADS, RunState
from tita.launch.runs import last_checkpoint
from tita.launch.watch import (
    ConnectionEvent,
    Informer,
    InformerEvent,
    LogStream,
    WatchForbidden,
    tail_log,
)
from tita.records import read_record
from tita.terminal import Output, counted, say

# Time in which a second Ctrl-C offers to cancel the run.
_SECOND_CTRL_C_S = 2.0
_LAST_LINES = 12
_MISSING_DEVICES = re.compile(r"Insufficient ([-.a-z0-9]+/[-_.a-zA-Z0-9]*[a-zA-Z0-9])")
"""Extended resources in the scheduler's message, such as `nvidia.com/mig-1g.10gb`."""
_MAX_PAUSE_S = 0.5
_MAX_SHARE = 0.02
"""A run is drawn again after at most half a second, and if drawing is slow, because it has many
pods, as seldom as needed for this share of the time."""


def watch_run(
    cluster: Cluster, run: str, *, output: Output = Output.TABLE, all_ranks: bool = False
) -> int:
    """Show a run until it is over; its exit code, or 130 after Ctrl-C."""
    return follow_run(cluster, run, open_display(output), all_ranks=all_ranks)


def follow_run(cluster: Cluster, run: str, display: Display, *, all_ranks: bool) -> int:
    """Follow a run on a display until it is over; its exit code, or 130 after Ctrl-C."""
    follower = Follower(cluster, run, display, all_ranks=all_ranks)
    try:
        outcome = follower.watch()
        display.close()
        follower.explain(outcome)
        return outcome.code
    except ApiError as error:
        error.what = f"cannot watch {run}, which continues: {error.what}"
        raise
    except KeyboardInterrupt:
        display.close()
        return _detach(cluster, run)
    finally:
        display.close()


def _detach(cluster: Cluster, run: str) -> int:
    try:
        watch = cluster.scope.tita("jobs watch", run)
        say(f"stopped watching {run}, which continues; to resume: {watch}")
        if sys.stdin.isatty():
            say("press Ctrl-C again to cancel it")
            time.sleep(_SECOND_CTRL_C_S)
    except KeyboardInterrupt:
        question = f"\ncancel {run}? Its checkpoints are kept. [y/N] "
        print(question, end="", file=sys.stderr, flush=True)
        with suppress(KeyboardInterrupt):
            if sys.stdin.readline().strip().lower() in ("y", "yes"):
                try:
                    say(cancel(cluster, run))
                except TitaError as error:
                    say(str(error))
    return ExitCode.INTERRUPTED


@dataclass(frozen=True, slots=True, kw_only=True)
class _LogLine:
    pod: str
    rank: int
    text: str


class Follower:
    """Follows a run; `watch` returns when it is over."""

    def __init__(
        self,
        cluster: Cluster,
        run: str,
        display: Display,
        *,
        all_ranks: bool = False,
        queue_every_s: float = 10.0,
    ) -> None:
        self._first = cluster
        # Informers and log streams reconnect by themselves.
        self._cluster = cluster.without_retries()
        self._display = display
        self._all_ranks = all_ranks
        self._state = RunState(run=run, scope=cluster.scope)
        self._inbox: queue.SimpleQueue[InformerEvent | _LogLine | RunReason] = queue.SimpleQueue()
        self._streams: dict[str, LogStream] = {}
        self._recent: dict[str, deque[str]] = {}
        self._said: set[str] = set()
        self._disconnected: set[str] = set()
        self._queue_every_s = queue_every_s
        self._stopped = threading.Event()
        self._last_line_at = 0.0
        self._clock_gap_s = time.time() - time.monotonic()

    def watch(self) -> RunOutcome:
        """Show the run until it is over.

        Raises:
            TitaError: there is no such run, or it must not be read.
            Unreachable: the API does not answer at the start; later outages are waited out.
            KeyboardInterrupt: Ctrl-C; the caller closes the display.
        """
        try:
            self._first.get(self._first.path(JOBS, self._state.run))
        except ApiError as error:  # other refusals are reported by the informers
            if error.status == 404:
                raise run_not_found(self._first, self._state.run) from None
        informers = self._start_informers()
        draw_at = 0.0
        try:
            while True:
                self._process(until=draw_at)
                if not {JOBS, PODS} <= self._state.listed:
                    continue
                if self._state.last_job is None:
                    raise run_not_found(self._cluster, self._state.run)
                self._report_sleep()
                started = time.monotonic()
                self._start_streams()
                snapshot = self._state.snapshot()
                self._display.update(snapshot)
                for reason in snapshot.reasons:
                    self._say_once(reason)
                ended = time.monotonic()
                draw_at = ended + min((ended - started) / _MAX_SHARE, _MAX_PAUSE_S)
                if snapshot.phase in OVER:
                    return self._finish()
        finally:
            self._stopped.set()
            for thread in (*informers, *self._streams.values()):
                thread.stop()

    def _start_informers(self) -> list[Informer]:
        run = self._state.run
        params = {
            JOBS: {"fieldSelector": f"metadata.name={run}"},
            PODS: {"labelSelector": f"{JOB_NAME}={run}"},
            EVENTS: {},
        }
        informers = [
            Informer(self._cluster, kind, params=selector, sink=self._inbox.put)
            for kind, selector in params.items()
        ]
        for informer in informers:
            informer.start()
        threading.Thread(target=self._poll_queue, daemon=True).start()
        return informers

    def _poll_queue(self) -> None:
        """List Kueue's workloads while the Job is queued: few users may watch them."""
        while not self._stopped.wait(self._queue_every_s / 10):
            job = self._state.job
            if job is None or not in_queue(job):
                continue
            try:
                found = list_workloads(self._cluster)
                self._inbox.put(ListEvent(kind=WORKLOADS, items=tuple(found)))
            except Unreachable:
                pass
            self._stopped.wait(self._queue_every_s)

    def _process(self, *, wait_s: float = 0.5, until: float = 0.0) -> None:
        """Wait for an event, and process all that are there, and those that arrive before `until`.

        Args:
            wait_s: longest wait for the first event.
            until: time on the monotonic clock.
        """
        try:
            self._process_one(self._inbox.get(timeout=wait_s))
            while True:
                left_s = until - time.monotonic()
                self._process_one(self._inbox.get(block=left_s > 0, timeout=max(left_s, 0.0)))
        except queue.Empty:
            return

    def _process_one(self, item: InformerEvent | _LogLine | RunReason) -> None:
        if isinstance(item, _LogLine):
            self._process_line(item)
        elif isinstance(item, RunReason):
            self._say_once(item)
        elif isinstance(item, ConnectionEvent):
            self._report_connection(item)
        elif isinstance(item, WatchForbidden):
            if item.kind == JOBS:
                raise item.error
            self._state.listed.add(item.kind)
            self._display.say(f"cannot watch {item.kind}: {item.error.what}")
        else:
            self._state.apply(item)

    def _process_line(self, line: _LogLine) -> None:
        self._last_line_at = time.monotonic()
        record = read_record(line.text)
        if record is None:
            self._recent.setdefault(line.pod, deque(maxlen=20)).append(line.text)
            self._display.line(str(line.rank), line.text)
        elif line.rank == 0:
            self._state.add_record(line.pod, record)

    def _report_connection(self, event: ConnectionEvent) -> None:
        """Report the first lost connection and the last restored one."""
        before = bool(self._disconnected)
        (self._disconnected.discard if event.restored else self._disconnected.add)(event.kind)
        if self._disconnected and not before:
            self._display.say(f"{event.why}; the run continues, reconnecting")
        elif before and not self._disconnected:
            self._display.say("the cluster's API answers again")

    def _report_sleep(self) -> None:
        """Report that this machine was suspended: its monotonic clock stopped."""
        gap_s = time.time() - time.monotonic()
        slept_s = gap_s - self._clock_gap_s
        self._clock_gap_s = gap_s
        if slept_s > 30:
            self._display.say(f"this machine slept for {slept_s / 60:.0f} min; catching up")

    def _start_streams(self) -> None:
        for uid, pod in self._state.pods.items():
            rank, name = rank_of(pod), pod["metadata"]["name"]
            if uid in self._streams or not (self._all_ranks or rank == 0):
                continue
            if not has_started(pod):
                continue  # an event will say that it has

            def put(text: str, rank: int = rank, name: str = name) -> None:
                self._inbox.put(_LogLine(pod=name, rank=rank, text=text))

            def notify(text: str, name: str = name) -> None:
                # The same failure of many pods is reported once.
                key = re.sub(r"\S*\d\S*", "#", text.replace(name, ""))
                self._inbox.put(RunReason(key=key, text=text))

            self._streams[uid] = LogStream(self._cluster, name, sink=put, notify=notify)
            self._streams[uid].start()

    def _say_once(self, reason: RunReason) -> None:
        if reason.key in self._said:
            return
        self._said.add(reason.key)
        self._display.say(reason.text)
        for resource in dict.fromkeys(_MISSING_DEVICES.findall(reason.text)):
            with suppress(TitaError):
                self._say_device_holders(resource)

    def _say_device_holders(self, resource: str) -> None:
        """Report who holds an extended resource: a kind of GPU, a MIG slice, an RDMA device."""
        is_gpu = resource.endswith("/gpu")
        held = device_holders(self._cluster, resource)
        own = held.pop(self._state.run, 0)
        if own:
            what = counted(own, "GPU") if is_gpu else f"{own} {resource}"
            self._display.say(
                f"{self._state.run} already holds {what}, which it frees if its "
                "other pods do not start in time (--gang-timeout)"
            )
        if held:
            what = "GPUs" if is_gpu else resource
            runs = ", ".join(f"{run} {num}" for run, num in [*held.items()][:8])
            more = f" and {len(held) - 8} more" if len(held) > 8 else ""
            self._display.say(f"{what} that other runs of this namespace hold: {runs}{more}")

    def _finish(self) -> RunOutcome:
        """Read the last lines of all logs and the last states of the pods."""
        self._last_line_at = time.monotonic()
        while time.monotonic() - self._last_line_at < 5.0:
            self._start_streams()
            self._process(wait_s=0.2)
            reading = any(stream.is_alive() for stream in self._streams.values())
            if not reading and self._inbox.empty():
                break
        self._display.update(self._state.snapshot())
        state = self._state
        scope = self._cluster.scope
        return run_outcome(state.job, state.pods.values(), run=state.run, scope=scope)

    def explain(self, outcome: RunOutcome) -> None:
        """Report how the run ended, with the last lines of the pod that shows the cause."""
        for line in outcome.lines:
            self._display.say(line)
        if outcome.pod is not None:
            for line in self._last_lines(outcome.pod):
                self._display.say(f"    {line}")
        remedies, state = list(outcome.remedies), self._state
        if outcome.code != ExitCode.OK and state.job is not None:
            container = main_container(state.job["spec"]["template"])
            store = plain_environment(container).get("TITA_STORE", "")
            if checkpoint := last_checkpoint(
                state.run, store=store, num_nodes=state.job["spec"].get("parallelism", 1)
            ):
                self._display.say(f"last complete checkpoint: {checkpoint}")
            remedies += next_steps(
                state.job,
                outcome,
                has_logs=state.has_logs,
                scope=self._cluster.scope,
                checkpoint=checkpoint,
            )
        for remedy in remedies:
            self._display.say(f"  - {remedy}")

    def _last_lines(self, pod: str) -> list[str]:
        # Most lines are progress records, which are not shown.
        lines = tail_log(self._cluster, pod, count=20 * _LAST_LINES)
        if lines := [line for line in lines if read_record(line) is None]:
            return lines[-_LAST_LINES:]
        if pod in self._recent:
            return list(self._recent[pod])[-_LAST_LINES:]
        for found in self._state.pods.values():
            if found["metadata"]["name"] == pod:
                message = str((terminated(found) or {}).get("message") or "")
                return message.splitlines()[-_LAST_LINES:]
        return []
