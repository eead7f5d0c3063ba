"""Downloads images over http(s): from allowed hosts and public addresses, bounded in size and time.

A URL that someone else has written must not give access to the private network (SSRF). Every hop of
a redirect is checked: scheme, allowed host, and that *all* addresses of the host are public. The
connection then goes to the checked address, so a name that resolves to another address later (DNS
rebinding) has no effect.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import urljoin, urlsplit

import httpx

from tita.errors import TitaError

_NOT_FETCHED = "the image could not be fetched"
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_HOST = re.compile(r"\.?[^\s.:/*@]+(\.[^\s.:/*@]+)*")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_IPV4_COMPATIBLE = ipaddress.ip_network("::/96")
"""Deprecated notation of IPv4 addresses in IPv6 (RFC 4291, 2.5.5.1)."""


def resolve_host(host: str, port: int) -> list[str]:
    """All addresses of a host."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[4][0]) for address in found]


def is_public(address: str) -> bool:
    """Whether an address is globally reachable; IPv4 addresses embedded in IPv6 are checked too."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None:
            return is_public(str(inner))
        if ip in _NAT64 or ip in _IPV4_COMPATIBLE:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast


class FetchFault(StrEnum):
    """Why an image was not fetched."""

    HOST = "host"
    """The host is not among the allowed ones."""
    PRIVATE = "private"
    """The host has a private address."""
    REFUSED = "refused"
    """Another scheme, or a response that is too large, too slow or not 200."""
    UNREACHABLE = "unreachable"
    """No connection, or no HTTP."""


class FetchError(Exception):
    """An image was not fetched. The text says nothing about the network behind a server."""

    def __init__(self, what: str, *, fault: FetchFault, detail: str = "") -> None:
        """Args:
        what: what is wrong, for the author of the URL.
        fault: the kind of error.
        detail: the status or the error of the connection, for a user on this machine only.
        """
        super().__init__(what)
        self.what = what
        self.fault = fault
        self.detail = detail


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFetcher:
    """Downloads images over http(s) from allowed hosts.

    Raises:
        TitaError: an allowed host is none, so no URL would have it.
    """

    hosts: tuple[str, ...] | None = ()
    """`images.example.org` allows this host only; `.example.org` allows all its subdomains, but not
    `example.org` itself. Any port is allowed. None allows all hosts."""
    timeout_s: float = 10.0
    """Of the whole download, redirects included."""
    max_redirects: int = 3
    resolve: Callable[[str, int], Sequence[str]] = resolve_host
    public: Callable[[str], bool] = is_public

    def __post_init__(self) -> None:
        for host in self.hosts or ():
            if not _HOST.fullmatch(host) and not _is_address(host):
                raise TitaError(
                    f"image host {host!r} is no host name",
                    remedy="give it without scheme and port; .example.org is all its subdomains",
                )

    def fetch(self, url: str, *, max_bytes: int) -> bytes:
        """Download `url`. Blocks; call it in a thread.

        Raises:
            FetchError: the host is not allowed, an address is private, or the response is too
                large, too slow or not 200.
        """
        try:
            return asyncio.run(self._fetch(url, max_bytes))
        except TimeoutError:
            raise _refused(f"the image did not arrive within {self.timeout_s:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            raise FetchError(
                _NOT_FETCHED,
                fault=FetchFault.UNREACHABLE,
                detail=str(error) or type(error).__name__,
            ) from None

    async def _fetch(self, url: str, max_bytes: int) -> bytes:
        # One timeout for the whole download: those of httpx start again with every byte received.
        async with (
            asyncio.timeout(self.timeout_s),
            httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=None) as client,
        ):
            for _ in range(self.max_redirects + 1):
                body, url = await self._fetch_hop(client, url, max_bytes)
                if body is not None:
                    return body
        raise _refused("too many redirects")

    async def _fetch_hop(
        self, client: httpx.AsyncClient, url: str, max_bytes: int
    ) -> tuple[bytes | None, str]:
        """The body at `url`, or None and the URL that it redirects to."""
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".").lower()
        if parts.scheme not in ("http", "https") or not host:
            raise _refused("images are fetched over http(s) only")
        if not self._allows(host):
            raise FetchError("images are not fetched from this host", fault=FetchFault.HOST)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        addresses = await asyncio.to_thread(self.resolve, host, port)
        if not addresses or not all(self.public(address) for address in addresses):
            raise FetchError(
                "images are not fetched from private addresses", fault=FetchFault.PRIVATE
            )
        address = addresses[0]
        netloc = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        target = parts._replace(netloc=netloc, fragment="").geturl()
        headers = {"host": parts.netloc.rpartition("@")[2], "accept": "image/*"}
        async with client.stream(
            "GET", target, extensions={"sni_hostname": host},
            # A small compressed response could be large once decompressed.
            headers=headers | {"accept-encoding": "identity"},
        ) as response:  # fmt: skip
            if response.status_code in _REDIRECTS:
                return None, urljoin(url, response.headers.get("location", ""))
            if response.status_code != 200:
                raise _refused(_NOT_FETCHED, detail=f"HTTP {response.status_code}")
            body = bytearray()
            async for piece in response.aiter_raw():
                body += piece
                if len(body) > max_bytes:
                    raise _refused(f"the image has more than {max_bytes:,} bytes")
            return bytes(body), url

    def _allows(self, host: str) -> bool:
        return self.hosts is None or any(_matches(host, each.lower()) for each in self.hosts)


def _refused(what: str, *, detail: str = "") -> FetchError:
    return FetchError(what, fault=FetchFault.REFUSED, detail=detail)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _matches(host: str, allowed: str) -> bool:
    return host.endswith(allowed) if allowed.startswith(".") else host == allowed
