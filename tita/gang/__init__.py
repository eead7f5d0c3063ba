"""Starts the worker processes of one node with torchrun and reduces their exits to one code."""

from tita.gang.cgroup import free_memory_bytes, num_cpus
from tita.gang.rendezvous import is_worker_lost, rendezvous_store, report_lost_worker
from tita.gang.torchrun import (
    decisive_exit_code,
    free_port,
    record_exit_code,
    run_workers,
    scratch_folder,
)
from tita.gang.watchdog import WATCHDOG

__all__ = [
    "WATCHDOG",
    "decisive_exit_code",
    "free_memory_bytes",
    "free_port",
    "is_worker_lost",
    "num_cpus",
    "record_exit_code",
    "rendezvous_store",
    "report_lost_worker",
    "run_workers",
    "scratch_folder",
]
