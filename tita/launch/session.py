"""A person at a terminal watching a run: letting go, coming back, cancelling."""

import sys
import time

from tita.errors import ExitCode, TitaError
from tita.launch.cluster import ApiError, Cluster
from tita.launch.follow import Follower
from tita.launch.jobs import cancel
from tita.launch.states import Snapshot
from tita.launch.views import View, open_view
from tita.terminal import Output, say

# How long a second Ctrl-C counts as one.
_SECOND_S = 2.0


def watch_run(
    cluster: Cluster, run: str, *, output: Output = Output.TABLE, all_ranks: bool = False
) -> int:
    """Show a run until it is over and return its exit code; 130 when the user lets go of it."""
    view = open_view(output)
    follower = Follower(cluster, run, view, all_ranks=all_ranks)
    return _follow(cluster, run, follower, view)


def print_logs(cluster: Cluster, run: str, *, all_ranks: bool = False) -> int:
    """Print a run's log to standard output until the run is over."""
    view = _LogView(prefixed=all_ranks)
    return _follow(cluster, run, Follower(cluster, run, view, all_ranks=all_ranks), view)


def _follow(cluster: Cluster, run: str, follower: Follower, view: View) -> int:
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


class _LogView:
    """The job's own lines on standard output, whatever else there is on standard error."""

    def __init__(self, *, prefixed: bool) -> None:
        self._prefixed = prefixed

    def update(self, snapshot: Snapshot) -> None:
        return

    def say(self, text: str) -> None:
        say(text)

    def line(self, source: str, text: str) -> None:
        print(f"{source}| {text}" if self._prefixed else text, flush=True)

    def close(self) -> None:
        return
