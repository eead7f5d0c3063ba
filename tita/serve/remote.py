"""Fetching images from allowed hosts without becoming a door into the cluster.

Every hop is checked: scheme, host list, and that *all* addresses its name resolves to are public.
The connection then goes to the address that was checked, so a name that resolves differently the
second time (DNS rebinding) gains nothing.
"""

import asyncio
import ipaddress
import socket
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
        if ip in _NAT64 or ip in _COMPATIBLE:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast


_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")
"""IPv4 addresses in IPv6 as they once were written (RFC 4291, 2.5.5.1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetcher:
    """Gets images by http(s) from a list of hosts."""

    hosts: tuple[str, ...] = ()
    """`images.example.org` is that host and none below it; `.example.org` is whatever lies below
    and not `example.org` itself. Any port of it."""
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
        try:
            return asyncio.run(self._fetch(url, max_bytes))
        except _Unfetchable as reason:
            raise Refusal(str(reason), param=param, code="image_url_refused") from None
        except TimeoutError:
            what = "the image came too slowly"
            raise Refusal(what, param=param, code="image_url_refused") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError):
            # No more than this: a finer answer would tell a client what lies behind the server.
            what = "the image could not be fetched"
            raise Refusal(what, param=param, code="image_url_unreachable") from None

    async def _fetch(self, url: str, max_bytes: int) -> bytes:
        # One bound on all of it: a timeout of httpx begins anew with every byte that comes.
        async with (
            asyncio.timeout(self.timeout_s),
            httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=None) as client,
        ):
            for _ in range(self.max_redirects + 1):
                body, url = await self._hop(client, url, max_bytes)
                if body is not None:
                    return body
        raise _Unfetchable("too many redirects")

    async def _hop(
        self, client: httpx.AsyncClient, url: str, max_bytes: int
    ) -> tuple[bytes | None, str]:
        parts = urlsplit(url)
        host, port = self._checked(url)
        address = await asyncio.to_thread(self._address, host, port)
        netloc = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        target = parts._replace(netloc=netloc, fragment="").geturl()
        headers = {"host": parts.netloc.rpartition("@")[2], "accept": "image/*"}
        async with client.stream(
            "GET", target, extensions={"sni_hostname": host},
            # A small compressed answer could be large once unpacked.
            headers=headers | {"accept-encoding": "identity"},
        ) as response:  # fmt: skip
            if response.status_code in _REDIRECTS:
                return None, urljoin(url, response.headers.get("location", ""))
            if response.status_code != 200:
                raise _Unfetchable("the image could not be fetched")
            return await _read(response, max_bytes=max_bytes), url

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


async def _read(response: httpx.Response, *, max_bytes: int) -> bytes:
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > max_bytes:
            raise _Unfetchable(f"the image has more than {max_bytes:,} bytes")
    return bytes(body)
