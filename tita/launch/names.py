"""Names of runs, which are names of Jobs, of their pods' hosts and of folders in the store."""

import re
import secrets
import time

from tita.errors import TitaError

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
# A pod's host is <run>-<index> and ends at 63 characters; Kubernetes refuses Jobs that leave less.
MAX_LENGTH = 57


def new_run_name(job: str) -> str:
    """A fresh name that sorts by time: `train-dpo-20261124-093015-k3f`."""
    letters = "abcdefghijkmnpqrstuvwxyz23456789"
    tail = "".join(secrets.choice(letters) for _ in range(3))
    return f"{job}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{tail}"


def check_run_name(name: str) -> str:
    """`name`, if it can be a Job, a host and a folder.

    Raises:
        TitaError: it cannot.
    """
    if len(name) > MAX_LENGTH:
        raise TitaError(
            f"{len(name)} characters", where=f"name {name!r}", remedy=f"use at most {MAX_LENGTH}"
        )
    if not _LABEL.fullmatch(name):
        raise TitaError(
            "not a name for a run",
            where=repr(name),
            remedy="use a-z, 0-9 and -, with a letter or digit at both ends",
        )
    return name
