"""The worker processes of one node: torchrun starts them, and one exit code tells their fate."""

from tita.gang.torchrun import run_workers, tell_fate

__all__ = ["run_workers", "tell_fate"]
