"""Two hosts on one machine: connected network namespaces as root, otherwise ports of one host."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tita.gang import free_port


@dataclass(frozen=True, kw_only=True)
class Host:
    """The environment of one node's processes."""

    prefix: tuple[str, ...] = ()
    """Command prefix that runs a command there."""
    env: dict[str, str] = field(default_factory=dict)
    name: str | None = None
    """Name of its network namespace, if it has one."""

    def pull_cable(self) -> None:
        """Disconnect it silently: its packets are dropped."""
        assert self.name is not None
        assert _ip("-n", self.name, "link", "set", "cable", "down")


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Two connected hosts, with the environment of a run on two nodes."""
    names = [f"tita-{os.getpid()}-{rank}" for rank in range(2)]
    try:
        made = _connect(names)
        address, port = ("10.77.0.1", 29500) if made else ("127.0.0.1", free_port())
        shared = {
            "TITA_NUM_NODES": "2",
            "TITA_MASTER_ADDR": address,
            "TITA_MASTER_PORT": str(port),
        }
        # Both have the same host name, from which gloo would derive its address.
        own = {"GLOO_SOCKET_IFNAME": "cable"} if made else {}
        yield [
            Host(
                name=name if made else None,
                prefix=("ip", "netns", "exec", name) if made else (),
                env=shared | own | {"TITA_NODE_RANK": str(rank)},
            )
            for rank, name in enumerate(names)
        ]
    finally:
        for name in names:
            _ip("netns", "delete", name)


def _connect(names: list[str]) -> bool:
    """Create both namespaces and the link; False if this user may not."""
    ends = [f"tv{os.getpid()}-{rank}" for rank in range(2)]
    steps = [
        *(("netns", "add", name) for name in names),
        ("link", "add", ends[0], "type", "veth", "peer", "name", ends[1]),
    ]
    for rank, (name, end) in enumerate(zip(names, ends, strict=True)):
        steps += [
            ("link", "set", end, "netns", name, "name", "cable"),
            ("-n", name, "address", "add", f"10.77.0.{rank + 1}/24", "dev", "cable"),
            ("-n", name, "link", "set", "cable", "up"),
            ("-n", name, "link", "set", "lo", "up"),
        ]
    return all(_ip(*step) for step in steps)


def _ip(*arguments: str) -> bool:
    try:
        return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode == 0
    except OSError:
        return False
