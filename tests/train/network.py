"""Two hosts on one machine: network namespaces with a cable between them, as root; else ports."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tita.gang import free_port


@dataclass(frozen=True, kw_only=True)
class Host:
    """Where one node's processes run."""

    prefix: tuple[str, ...] = ()
    """What comes before a command to run it there."""
    env: dict[str, str] = field(default_factory=dict)
    name: str | None = None
    """Of its network namespace, if it has one."""

    def pull_cable(self) -> None:
        """Cut it off: what it sends goes nowhere, and nobody is told."""
        assert self.name is not None
        assert _ip("-n", self.name, "link", "set", "cable", "down")


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """A pair of hosts that reach each other, with the environment of a gang of two nodes."""
    names = [f"tita-{os.getpid()}-{rank}" for rank in range(2)]
    try:
        made = _connect(names)
        address, port = ("10.77.0.1", 29500) if made else ("127.0.0.1", free_port())
        shared = {
            "TITA_NUM_NODES": "2",
            "TITA_MASTER_ADDR": address,
            "TITA_MASTER_PORT": str(port),
        }
        # Both share this machine's name, by which gloo would look for its own address.
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
    """Make both namespaces and the cable; False where this user may not."""
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
