"""Memory and CPU limits of this container, from control groups version 2 or 1.

https://docs.kernel.org/admin-guide/cgroup-v2.html
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
https://docs.kernel.org/scheduler/sched-bwc.html
"""

import os
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def num_memory_kills() -> int:
    """Number of processes that the OOM killer ended in this container; 0 if unknown."""
    return _table(v2="memory.events", v1="memory.oom_control").get("oom_kill", 0)


def memory_limit_bytes() -> int | None:
    """The memory limit of this container; None without one."""
    limit = _number(v2="memory.max", v1="memory.limit_in_bytes")
    # Version 1 has a huge number where there is no limit.
    return limit if limit is not None and limit < 2**60 else None


def peak_memory_bytes() -> int | None:
    """The most memory that this container has used; None if unknown (Linux before 5.19)."""
    return _number(v2="memory.peak", v1="memory.max_usage_in_bytes")


def free_memory_bytes() -> int:
    """Available memory of this machine, or of this container if its limit is lower."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit = _number(v2="memory.max", v1="memory.limit_in_bytes")
    used = _number(v2="memory.current", v1="memory.usage_in_bytes")
    if limit is None or used is None:
        return free
    # The page cache counts as used but is reclaimable.
    stat = _table(v2="memory.stat", v1="memory.stat")
    reclaimable = stat.get("total_inactive_file", stat.get("inactive_file", 0))
    return max(0, min(free, limit - used + reclaimable))


def num_cpus() -> int:
    """CPUs that this container may use; often fewer than the machine has."""
    allowed = len(os.sched_getaffinity(0))
    if file := _file(v2="cpu.max", v1="", controller="cpu"):
        quota, period = file.read_text().split()
    else:
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        files = [_file(v2="", v1=name, controller="cpu") for name in names]
        quota, period = (file.read_text().strip() if file else "-1" for file in files)
    # "max" and -1 mean no limit.
    return min(allowed, max(1, int(quota) // int(period))) if quota.isdigit() else allowed


def _file(*, v2: str, v1: str, controller: str = "memory") -> Path | None:
    """The control file of this process's group; in a container it may be at the root."""
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            found += [_ROOT / controller / path.strip("/") / v1, _ROOT / controller / v1]
        elif not controllers:
            found += [_ROOT / path.strip("/") / v2, _ROOT / v2]
    return next((file for file in found if file.is_file()), None)


def _number(*, v2: str, v1: str) -> int | None:
    file = _file(v2=v2, v1=v1)
    text = "" if file is None else file.read_text().strip()
    return int(text) if text.isdigit() else None


def _table(*, v2: str, v1: str) -> dict[str, int]:
    file = _file(v2=v2, v1=v1)
    lines = [] if file is None else file.read_text().splitlines()
    return {name: int(value) for name, value in (line.split(maxsplit=1) for line in lines)}
