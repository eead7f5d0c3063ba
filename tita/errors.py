"""Exceptions and exit codes.

One table for every process of tita: the CLI, the workers in pods, and the chart's
podFailurePolicy (a test compares the chart's numbers with these).
"""

import errno
import re
from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes; they decide whether a job is retried."""

    OK = 0
    FAILED = 1
    """The job failed. torchrun also exits with this code for any failure."""
    USER = 2
    """Invalid usage, configuration or data. Never retried."""
    UNREACHABLE = 3
    """The cluster is unreachable."""
    GATE_MISSED = 10
    """A gate of a benchmark was missed: a result, not a fault. Never retried."""
    NO_DEVICE = 11
    """The pod holds GPUs and none is usable. Never retried: the node or image must change."""
    OUT_OF_MEMORY = 12
    """Device memory ran out. Never retried: the same settings fail again. Cf. ENOMEM."""
    OUT_OF_TRIES = 13
    """The gang failed more often than its tries allow. Never retried."""
    GANG_INCOMPLETE = 14
    """Not all nodes of the gang started in time. Never retried: those that did would hold their
    GPUs again."""
    DAMAGED = 65
    """The store has a tree or an object without its recorded content. Never retried: it stays so.
    Cf. EX_DATAERR."""
    INCOMPLETE = 69
    """Too many questions of a benchmark have no answer. Never retried: the job asked them again.
    Cf. EX_UNAVAILABLE."""
    HUNG = 70
    """A rank made no progress, or waited for a process that made none. Retried; counts as a
    failure."""
    CONFLICT = 73
    """Another process changed the tree during a push; its result counts. Never retried.
    Cf. EX_CANTCREAT."""
    RETRY = 75
    """Preempted, or the store or network was unavailable. Retried; not counted. Cf. EX_TEMPFAIL."""
    LOST_PEER = 76
    """Another rank was lost. Retried; not counted, because the lost rank's own code counts."""
    INTERRUPTED = 130
    """Interrupted by Ctrl-C."""
    TERMINATED = 143
    """SIGTERM before any state could be saved. Retried; not counted."""


UNCOUNTED = frozenset({ExitCode.RETRY, ExitCode.LOST_PEER, ExitCode.TERMINATED})
"""Codes after which a gang starts again without using one of its tries."""
NEVER_RETRIED = frozenset(
    {ExitCode.USER, ExitCode.GATE_MISSED, ExitCode.NO_DEVICE, ExitCode.OUT_OF_MEMORY}
    | {ExitCode.OUT_OF_TRIES, ExitCode.GANG_INCOMPLETE, ExitCode.DAMAGED, ExitCode.INCOMPLETE}
    | {ExitCode.CONFLICT}
)
"""Codes after which Kubernetes fails the Job."""
ABORTED = 134
"""SIGABRT. NCCL aborts the ranks that lost another node, so Kubernetes does not count it; the gang
counts it unless a node was lost."""
IGNORED = UNCOUNTED | {ABORTED}
"""Codes that Kubernetes retries without counting them against the back-off limit."""


class TitaError(Exception):
    """A failure that is reported in one line: what, where, and the remedy.

    The base class stands for invalid input; subclasses have their own `exit_code`.
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
    """A job ended without producing its result."""

    exit_code = ExitCode.FAILED


class GateMissed(JobFailed):
    """A benchmark is complete, and missed one of its gates."""

    exit_code = ExitCode.GATE_MISSED


class Incomplete(JobFailed):
    """Too many questions of a benchmark have no answer."""

    exit_code = ExitCode.INCOMPLETE


class Unreachable(TitaError):
    """The Kubernetes API does not answer."""

    exit_code = ExitCode.UNREACHABLE


class StoreUnavailable(TitaError):
    """A transient failure of the store: throttling, connection resets, time-outs."""

    exit_code = ExitCode.RETRY


class HubUnavailable(TitaError):
    """The model hub does not answer, and what is needed is not in its local cache."""

    exit_code = ExitCode.RETRY


class DamagedData(TitaError):
    """A tree or an object in the store does not have the content that its writer recorded."""

    exit_code = ExitCode.DAMAGED


class PushConflict(TitaError):
    """Another process changed a tree during a push, which therefore changed nothing."""

    exit_code = ExitCode.CONFLICT


class Preempted(TitaError):
    """SIGTERM was received and the state was saved."""

    exit_code = ExitCode.RETRY


class NoProgress(TitaError):
    """A process that this one waits for made no progress in time."""

    exit_code = ExitCode.HUNG


class NoDevice(TitaError):
    """GPUs are assigned to this process, and none is usable."""

    exit_code = ExitCode.NO_DEVICE


class OutOfTries(TitaError):
    """The gang failed more often than its `tries` allow."""

    exit_code = ExitCode.OUT_OF_TRIES


class StepFailed(TitaError):
    """The engine failed on one request; the others of its batch are not affected."""

    exit_code = ExitCode.FAILED


class OutOfDeviceMemory(TitaError):
    """Device memory ran out for one request alone."""

    exit_code = ExitCode.OUT_OF_MEMORY


class LostPeer(TitaError):
    """Another rank of the gang was lost."""

    exit_code = ExitCode.LOST_PEER


_OUT_OF_MEMORY = re.compile("out of memory|CUBLAS_STATUS_ALLOC_FAILED|can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is Python's or torch's report that memory ran out, on the host or a device."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
    )


_DISK_FULL = re.compile(
    r"inline_container\.cc:\d+\] \. unexpected pos|PytorchStreamWriter failed|basic_ios::clear"
)


def is_disk_full(error: BaseException) -> bool:
    """Whether a file could not be written because its disk is full or the user's quota is used up.

    torch reports a position that its file does not have, safetensors the system's message.
    """
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    text = str(error)
    is_of_torch = isinstance(error, RuntimeError) and _DISK_FULL.search(text) is not None
    is_of_safetensors = type(error).__name__ == "SafetensorError" and "os error 28" in text
    return is_of_torch or is_of_safetensors


_REMEDIES = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some space or choose another folder",
    errno.EROFS: "choose a folder on a writable file system",
    errno.EACCES: "check the permissions or choose another folder",
    errno.EPERM: "check the permissions or choose another folder",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.ELOOP: "check the links in the path",
    errno.ENAMETOOLONG: "shorten the name",
    errno.EISDIR: "name a file, not a folder",
    errno.EEXIST: "the name is taken; choose another",
    errno.EADDRINUSE: "choose another port",
    errno.ESPIPE: "name a regular file",
}


_ABOUT_TARGET = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EISDIR, errno.EEXIST)


def from_os_error(error: OSError) -> TitaError | None:
    """An operating-system error that a user can fix as a `TitaError`; None for any other."""
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None:
        return None
    name = error.filename
    if error.filename2 is not None and error.errno in _ABOUT_TARGET:
        name = error.filename2  # of a copy or a renamed file, whose source is not at fault
    where = name if isinstance(name, str) else None
    return TitaError((error.strerror or str(error)).lower(), where=where, remedy=remedy)
