"""What can go wrong, and the exit codes that say so.

One table for every process of tita: the CLI, the workers in pods, and the chart's
podFailurePolicy (a test holds the chart's numbers and these together).
"""

import errno
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes; a job's retry behaviour hangs on them."""

    OK = 0
    FAILED = 1
    """The job failed, or a gate of a benchmark did; also torchrun's own code for any failure."""
    USER = 2
    """The user's mistake or bad data. Never retried."""
    UNREACHABLE = 3
    """The cluster is out of reach."""
    OUT_OF_MEMORY = 12
    """Device memory ran out. Never retried: the same settings would run out again. Cf. ENOMEM."""
    HUNG = 70
    """A rank made no progress and its watchdog ended it. Retried, and counted."""
    RETRY = 75
    """Preempted, or the store or network was away. Retried, not counted. Cf. EX_TEMPFAIL."""
    LOST_PEER = 76
    """Another rank went away. Retried, not counted: the lost rank's own code counts."""
    INTERRUPTED = 130
    """Let go by Ctrl-C."""
    TERMINATED = 143
    """SIGTERM before anything could be saved. Retried, not counted."""


UNCOUNTED = frozenset({ExitCode.RETRY, ExitCode.LOST_PEER, ExitCode.TERMINATED})
"""Ends that are not the job's fault: Kubernetes tries again, whatever the back-off limit is."""


class TitaError(Exception):
    """A failure told in one line: what, where, and the remedy.

    The plain class is the user's mistake. Subclasses carry another `exit_code`.
    """

    exit_code: ExitCode = ExitCode.USER

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(what, where, remedy)
        self.what = what
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return " ".join(f"{place}{self.what}{remedy}".split())


class JobFailed(TitaError):
    """A job ended without its result."""

    exit_code = ExitCode.FAILED


class Unreachable(TitaError):
    """The cluster's API gives no answer."""

    exit_code = ExitCode.UNREACHABLE


class StoreUnavailable(TitaError):
    """The store failed in a way that may pass: throttling, resets, time-outs."""

    exit_code = ExitCode.RETRY


class Preempted(TitaError):
    """SIGTERM was obeyed and the state was saved."""

    exit_code = ExitCode.RETRY


class LostPeer(TitaError):
    """Another rank of the gang went away."""

    exit_code = ExitCode.LOST_PEER


class OutOfMemory(TitaError):
    """Device memory ran out."""

    exit_code = ExitCode.OUT_OF_MEMORY


_REMEDIES = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some space or choose another folder",
    errno.EROFS: "choose a folder on a writable file system",
    errno.EACCES: "check the permissions or choose another folder",
    errno.EPERM: "check the permissions or choose another folder",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "name a file, not a folder",
    errno.EEXIST: "something else has that name; choose another",
    errno.EADDRINUSE: "choose another port",
}


def from_os_error(error: OSError) -> TitaError | None:
    """The one-line form of an operating-system error that a user can mend, else None."""
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None:
        return None
    where = error.filename if isinstance(error.filename, str) else None
    return TitaError((error.strerror or str(error)).lower(), where=where, remedy=remedy)
