"""The worker processes of one node: torchrun starts them, and one exit code tells their fate."""

from tita.gang.cgroup import free_memory_bytes, num_cpus
from tita.gang.meeting import is_one_lost, meeting_store, tell_lost
from tita.gang.torchrun import free_port, run_workers, tell_fate, telling

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
