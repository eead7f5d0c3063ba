"""Taking in the images of a request: base64, `data:` URLs, and allowed hosts.

Fetching one is waiting, which many can do at once; unpacking it is work, which waits for its turn.
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
from typing import TYPE_CHECKING
from urllib.parse import unquote, unquote_to_bytes, urljoin, urlsplit

import httpx

from tita.errors import TitaError
from tita.serve.errors import APIError, encodable
from tita.serve.options import Limits
from tita.vlm import open_image

if TYPE_CHECKING:
    from PIL.Image import Image


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
class ImageFetcher:
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
            APIError: the host is not allowed, an address is private, or the answer is too large,
                too slow or no 200.
        """
        try:
            return asyncio.run(self._fetch(url, max_bytes))
        except _Unfetchable as reason:
            raise APIError(str(reason), param=param, code="image_url_refused") from None
        except TimeoutError:
            what = "the image came too slowly"
            raise APIError(what, param=param, code="image_url_refused") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError):
            # No more than this: a finer answer would tell a client what lies behind the server.
            what = "the image could not be fetched"
            raise APIError(what, param=param, code="image_url_unreachable") from None

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


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """An image that has come and has not been looked at."""

    content: Callable[[], bytes]
    """The bytes of its file; raises `APIError`."""
    num_bytes: int
    """As it came."""
    limits: Limits
    param: str | None
    """Where the request has it."""

    def decoded(self) -> "Image":
        """Its pixels; the size is checked before one is unpacked.

        Raises:
            APIError: too large, truncated, a bomb, or no image.
        """
        import PIL.Image

        content = self.content()
        if len(content) > self.limits.max_image_bytes:
            raise _too_large(self.limits, self.param)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
                with PIL.Image.open(io.BytesIO(content)) as header:
                    num_pixels = header.width * header.height
            if num_pixels > self.limits.max_pixels:
                raise self._refusal(f"the image has {num_pixels:,} pixels, more than")
            return open_image(content, where="image")
        except (APIError, MemoryError):
            raise
        except PIL.Image.DecompressionBombError:
            raise self._refusal("the image has more than") from None
        except TitaError as error:
            raise APIError(error.what, param=self.param, code="invalid_image") from None
        except Exception:
            # Decoders of forty formats fail in as many ways on bytes made to make them fail.
            raise APIError("not a readable image", param=self.param, code="invalid_image") from None

    def _refusal(self, what: str) -> APIError:
        message = f"{what} {self.limits.max_pixels:,} pixels"
        return APIError(message, param=self.param, code="image_too_large")


def image_from_url(
    url: str, *, limits: Limits, fetcher: ImageFetcher, param: str | None = None
) -> EncodedImage:
    """The image at a `data:` or http(s) URL. Blocks; call it in a thread.

    Raises:
        APIError: not allowed, or too large.
    """
    if not url.isascii() and url != encodable(url):
        raise APIError("the URL is no Unicode", param=param, code="invalid_image_url")
    url = url.strip()
    scheme = url[:8].lower()
    if scheme.startswith("data:"):
        content = partial(_from_data_url, url, limits=limits, param=param)
        return EncodedImage(content=content, num_bytes=len(url), limits=limits, param=param)
    if scheme.startswith(("http://", "https://")):
        fetched = fetcher.fetch(url, max_bytes=limits.max_image_bytes, param=param)
        return encoded_image(fetched, limits=limits, param=param)
    raise APIError(
        "an image is given as a data: URL or by http(s)", param=param, code="invalid_image_url"
    )


def image_from_base64(text: str, *, limits: Limits) -> EncodedImage:
    """The image in a base64 string."""
    content = partial(_from_base64, text, limits=limits, param=None)
    return EncodedImage(content=content, num_bytes=len(text), limits=limits, param=None)


def encoded_image(content: bytes, *, limits: Limits, param: str | None = None) -> EncodedImage:
    """The image in the bytes of a file."""
    return EncodedImage(content=lambda: content, num_bytes=len(content), limits=limits, param=param)


def _from_data_url(url: str, *, limits: Limits, param: str | None) -> bytes:
    head, comma, data = url.partition(",")
    if not comma:
        raise APIError("a data: URL without data", param=param, code="invalid_image_url")
    if head.lower().rstrip().endswith(";base64"):
        # RFC 2397 takes its data from URLs, in which `+` and `=` may be escaped.
        return _from_base64(unquote(data), limits=limits, param=param)
    if len(data) > 3 * limits.max_image_bytes:
        raise _too_large(limits, param)
    return unquote_to_bytes(data)


def _from_base64(text: str, *, limits: Limits, param: str | None) -> bytes:
    if len(text) > 1.4 * limits.max_image_bytes + 1024:
        raise _too_large(limits, param)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise APIError("the image is no base64", param=param, code="invalid_base64") from None


def _too_large(limits: Limits, param: str | None) -> APIError:
    return APIError(
        f"the image has more than {limits.max_image_bytes:,} bytes",
        param=param, code="image_too_large",
    )  # fmt: skip
