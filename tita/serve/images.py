"""Images of a request: from base64, `data:` URLs, and http(s) URLs on allowed hosts.

Downloads run concurrently, one thread per request; decoding runs in the prepare queue.

Downloads must not give clients access to the private network (SSRF). Every hop of a redirect is
checked: scheme, allowed host, and that *all* addresses of the host are public. The connection then
goes to the checked address, so a name that resolves to another address later (DNS rebinding) has no
effect.
"""

import asyncio
import base64
import binascii
import io
import ipaddress
import socket
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import unquote, unquote_to_bytes, urljoin, urlsplit

import httpx
import PIL.Image

from tita.errors import TitaError
from tita.records import IMAGE_FORMATS
from tita.serve.errors import APIError, replace_surrogates
from tita.serve.serve_options import Limits
from tita.vlm.images import open_image

_REDIRECTS = frozenset((301, 302, 303, 307, 308))
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


class _DownloadRejected(Exception):
    """A download failed with a message that the client may read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFetcher:
    """Downloads images over http(s) from allowed hosts."""

    hosts: tuple[str, ...] = ()
    """`images.example.org` allows this host only; `.example.org` allows all its subdomains, but not
    `example.org` itself. Any port is allowed."""
    timeout_s: float = 10.0
    """Of the whole download, redirects included."""
    max_redirects: int = 3
    resolve: Callable[[str, int], Sequence[str]] = resolve_host
    public: Callable[[str], bool] = is_public

    def fetch(self, url: str, *, max_bytes: int, param: str | None = None) -> bytes:
        """Download `url`. Blocks; call it in a thread.

        Raises:
            APIError: the host is not allowed, an address is private, or the response is too large,
                too slow or not 200.
        """
        try:
            return asyncio.run(self._fetch(url, max_bytes))
        except _DownloadRejected as reason:
            raise APIError(str(reason), param=param, code="image_url_refused") from None
        except TimeoutError:
            what = f"the image did not arrive within {self.timeout_s:g} s"
            raise APIError(what, param=param, code="image_url_refused") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError):
            # No details: they would tell a client about the network behind the server.
            what = "the image could not be fetched"
            raise APIError(what, param=param, code="image_url_unreachable") from None

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
        raise _DownloadRejected("too many redirects")

    async def _fetch_hop(
        self, client: httpx.AsyncClient, url: str, max_bytes: int
    ) -> tuple[bytes | None, str]:
        """The body at `url`, or None and the URL that it redirects to."""
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".").lower()
        if parts.scheme not in ("http", "https") or not host:
            raise _DownloadRejected("images are fetched over http(s) only")
        if not any(_matches(host, allowed.lower()) for allowed in self.hosts):
            raise _DownloadRejected("images are not fetched from this host; send a data: URL")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        addresses = await asyncio.to_thread(self.resolve, host, port)
        if not addresses or not all(self.public(address) for address in addresses):
            raise _DownloadRejected("images are not fetched from private addresses")
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
                raise _DownloadRejected("the image could not be fetched")
            body = bytearray()
            async for piece in response.aiter_raw():
                body += piece
                if len(body) > max_bytes:
                    raise _DownloadRejected(f"the image has more than {max_bytes:,} bytes")
            return bytes(body), url


def _matches(host: str, allowed: str) -> bool:
    return host.endswith(allowed) if allowed.startswith(".") else host == allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """An image that has been received and not decoded."""

    read: Callable[[], bytes]
    """Returns the bytes of its file; raises `APIError`."""
    num_bytes: int
    """As received."""
    limits: Limits
    param: str | None
    """The field of the request that contains it."""

    def decode(self) -> PIL.Image.Image:
        """Decode the image, after a check of the size in its header.

        Raises:
            APIError: it is too large, truncated, a decompression bomb, or not an image.
        """
        content = self.read()
        if len(content) > self.limits.max_image_bytes:
            raise _too_many_bytes(self.limits, self.param)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
                with PIL.Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as header:
                    num_pixels = header.width * header.height
            if num_pixels > self.limits.max_pixels:
                raise PIL.Image.DecompressionBombError
            return open_image(content, where="image")
        except MemoryError:
            raise
        except PIL.Image.DecompressionBombError:
            what = f"the image has more than {self.limits.max_pixels:,} pixels"
            raise APIError(what, param=self.param, code="image_too_large") from None
        except TitaError as error:
            raise APIError(error.what, param=self.param, code="invalid_image") from None
        except Exception:
            # Pillow's decoders raise many kinds of exceptions on malformed files.
            raise APIError("not a readable image", param=self.param, code="invalid_image") from None


def image_from_url(
    url: str, *, limits: Limits, fetcher: ImageFetcher, param: str | None = None
) -> EncodedImage:
    """The image at a `data:` or http(s) URL. Blocks; call it in a thread.

    Raises:
        APIError: the URL is not allowed, or the image is too large.
    """
    if not url.isascii() and url != replace_surrogates(url):
        raise APIError("the image URL is not valid Unicode", param=param, code="invalid_image_url")
    url = url.strip()
    scheme = url[:8].lower()
    if scheme.startswith("data:"):
        read = partial(_decode_data_url, url, limits=limits, param=param)
        return EncodedImage(read=read, num_bytes=len(url), limits=limits, param=param)
    if scheme.startswith(("http://", "https://")):
        content = fetcher.fetch(url, max_bytes=limits.max_image_bytes, param=param)
        return EncodedImage(
            read=lambda: content, num_bytes=len(content), limits=limits, param=param
        )
    raise APIError(
        "an image URL must be a data: URL or an http(s) URL", param=param, code="invalid_image_url"
    )


def image_from_base64(text: str, *, limits: Limits) -> EncodedImage:
    """The image in a base64 string."""
    read = partial(_decode_base64, text, limits=limits, param=None)
    return EncodedImage(read=read, num_bytes=len(text), limits=limits, param=None)


def _decode_data_url(url: str, *, limits: Limits, param: str | None) -> bytes:
    head, comma, data = url.partition(",")
    if not comma:
        raise APIError("the data: URL has no data", param=param, code="invalid_image_url")
    if head.lower().rstrip().endswith(";base64"):
        # In a URL, `+` and `=` may be percent-encoded (RFC 2397).
        return _decode_base64(unquote(data), limits=limits, param=param)
    if len(data) > 3 * limits.max_image_bytes:
        raise _too_many_bytes(limits, param)
    return unquote_to_bytes(data)


def _decode_base64(text: str, *, limits: Limits, param: str | None) -> bytes:
    if len(text) > 1.4 * limits.max_image_bytes + 1024:
        raise _too_many_bytes(limits, param)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise APIError(
            "the image is not valid base64", param=param, code="invalid_base64"
        ) from None


def _too_many_bytes(limits: Limits, param: str | None) -> APIError:
    return APIError(
        f"the image has more than {limits.max_image_bytes:,} bytes",
        param=param, code="image_too_large",
    )  # fmt: skip
