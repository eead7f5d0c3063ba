"""The worker processes of one node: torchrun starts them, and one exit code tells their fate."""

from tita.gang.cgroup import free_memory_bytes, num_cpus
from tita.gang.torchrun import (
    free_port,
    is_one_lost,
    meeting_store,
    run_workers,
    tell_fate,
    tell_lost,
    telling,
)

__all__ = [
    "free_memory_bytes",
    "free_port",
    "is_one_lost",
    "meeting_store",
    "num_cpus",
    "run_workers",
    "tell_fate",
    "tell_lost",
    "telling",
]
