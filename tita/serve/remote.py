"""Fetching images from allowed hosts without becoming a door into the cluster.

Every hop is checked: scheme, host list, and that *all* addresses its name resolves to are public.
The connection then goes to the address that was checked, so a name that resolves differently the
second time (DNS rebinding) gains nothing.
"""

import ipaddress
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import httpx

from tita.serve.failures import Refusal

_REDIRECTS = frozenset((301, 302, 303, 307, 308))

Resolve = Callable[[str, int], Sequence[str]]
"""From host and port to addresses."""


def resolve_host(host: str, port: int) -> list[str]:
    """All addresses of a host."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[4][0]) for address in found]


def is_public(address: str) -> bool:
    """Whether an address lies on the open internet; IPv4 in IPv6 is looked into."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None:
            return is_public(str(inner))
        if ip in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    return ip.is_global and not ip.is_multicast


_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetcher:
    """Gets images by http(s) from a list of hosts."""

    hosts: tuple[str, ...] = ()
    timeout_s: float = 10.0
    """For the whole of it, redirects included."""
    max_redirects: int = 3
    resolve: Resolve = resolve_host
    public: Callable[[str], bool] = is_public

    def fetch(self, url: str, *, max_bytes: int, param: str | None = None) -> bytes:
        """The body at `url`. Blocks; call it in a thread.

        Raises:
            Refusal: the host is not allowed, an address is private, or the answer is too large,
                too slow or no 200.
        """
        deadline = time.monotonic() + self.timeout_s
        try:
            with httpx.Client(trust_env=False, follow_redirects=False) as client:
                for _ in range(self.max_redirects + 1):
                    body, url = self._hop(client, url, deadline, max_bytes)
                    if body is not None:
                        return body
        except _Unfetchable as reason:
            raise Refusal(str(reason), param=param, code="image_url_refused") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError):
            # No more than this: a finer answer would tell a client what lies behind the server.
            what = "the image could not be fetched"
            raise Refusal(what, param=param, code="image_url_unreachable") from None
        raise Refusal("too many redirects", param=param, code="image_url_refused")

    def _hop(
        self, client: httpx.Client, url: str, deadline: float, max_bytes: int
    ) -> tuple[bytes | None, str]:
        parts = urlsplit(url)
        host, port = self._checked(url)
        address = self._address(host, port)
        netloc = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        target = parts._replace(netloc=netloc, fragment="").geturl()
        left_s = max(deadline - time.monotonic(), 0.001)
        with client.stream(
            "GET", target, timeout=left_s,
            headers={"host": parts.netloc.rpartition("@")[2], "accept": "image/*"},
            extensions={"sni_hostname": host},
        ) as response:  # fmt: skip
            if response.status_code in _REDIRECTS:
                return None, urljoin(url, response.headers.get("location", ""))
            if response.status_code != 200:
                raise _Unfetchable("the image could not be fetched")
            return _read(response, deadline=deadline, max_bytes=max_bytes), url

    def _checked(self, url: str) -> tuple[str, int]:
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".").lower()
        if parts.scheme not in ("http", "https") or not host:
            raise _Unfetchable("images are fetched by http(s) only")
        if not any(_matches(host, allowed.lower()) for allowed in self.hosts):
            raise _Unfetchable("images are not fetched from this host; send a data: URL")
        return host, parts.port or (443 if parts.scheme == "https" else 80)

    def _address(self, host: str, port: int) -> str:
        addresses = self.resolve(host, port)
        if not addresses or not all(self.public(address) for address in addresses):
            raise _Unfetchable("images are not fetched from private addresses")
        return addresses[0]


class _Unfetchable(Exception):
    """Refused, in words that the client may read."""


def _matches(host: str, allowed: str) -> bool:
    return host.endswith(allowed) if allowed.startswith(".") else host == allowed


def _read(response: httpx.Response, *, deadline: float, max_bytes: int) -> bytes:
    body = bytearray()
    for piece in response.iter_bytes():
        body += piece
        if len(body) > max_bytes:
            raise _Unfetchable(f"the image has more than {max_bytes:,} bytes")
        if time.monotonic() > deadline:
            raise _Unfetchable("the image came too slowly")
    return bytes(body)
