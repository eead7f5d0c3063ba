"""Images of a request: from base64, `data:` URLs, and http(s) URLs on allowed hosts.

Downloads (`tita.vlm.image_fetcher`) run concurrently, one thread per request; decoding runs in the
prepare queue.
"""

import contextlib
import io
import string
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from urllib.parse import unquote, unquote_to_bytes

import PIL.Image
import pybase64

from tita.errors import TitaError
from tita.records import IMAGE_FORMATS
from tita.serve.errors import APIError, replace_surrogates
from tita.serve.serve_options import Limits
from tita.vlm.image_fetcher import FetchError, FetchFault, ImageFetcher
from tita.vlm.images import open_image

_BASE64_CHARS = f"{string.ascii_letters}{string.digits}+/=".encode()


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
            if _num_pixels(content) > self.limits.max_pixels:
                raise PIL.Image.DecompressionBombError
            return open_image(content, where="image")
        except PIL.Image.DecompressionBombError:
            what = f"the image has more than {self.limits.max_pixels:,} pixels"
            raise APIError(what, param=self.param, code="image_too_large") from None
        except TitaError as error:
            raise APIError(str(error), param=self.param, code="invalid_image") from None


def _num_pixels(content: bytes) -> int:
    """As the header of a file says; 0 if it cannot be read, which `open_image` reports."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
                return image.width * image.height
    except (MemoryError, PIL.Image.DecompressionBombError):
        raise
    except Exception:
        # Pillow's decoders raise many kinds of exceptions on malformed files.
        return 0


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
        content = _fetch(url, limits=limits, fetcher=fetcher, param=param)
        return EncodedImage(
            read=lambda: content, num_bytes=len(content), limits=limits, param=param
        )
    raise APIError(
        "an image URL must be a data: URL or an http(s) URL", param=param, code="invalid_image_url"
    )


def _fetch(url: str, *, limits: Limits, fetcher: ImageFetcher, param: str | None) -> bytes:
    try:
        return fetcher.fetch(url, max_bytes=limits.max_image_bytes)
    except FetchError as error:
        # Its details would tell a client about the network behind the server.
        reachable = error.fault is not FetchFault.UNREACHABLE
        allowed = error.fault not in (FetchFault.HOST, FetchFault.PRIVATE)
        what = error.what if allowed else f"{error.what}; send a data: URL"
        code = "image_url_refused" if reachable else "image_url_unreachable"
        raise APIError(what, param=param, code=code) from None


def image_from_base64(text: str, *, limits: Limits) -> EncodedImage:
    """The image in a base64 string."""
    read = partial(_decode_base64, text, limits=limits, param=None)
    return EncodedImage(read=read, num_bytes=len(text), limits=limits, param=None)


def _decode_data_url(url: str, *, limits: Limits, param: str | None) -> bytes:
    head, _, data = url.partition(",")
    if head.count('"') % 2:
        what = "the data: URL has a comma in a quoted parameter; write the comma as %2C"
        raise APIError(what, param=param, code="invalid_image_url")
    if not data.strip():
        raise APIError("the data: URL has no data", param=param, code="invalid_image_url")
    _, semicolon, extension = head.rpartition(";")
    if semicolon and extension.strip().lower() == "base64":
        # In a URL, `+` and `=` may be percent-encoded (RFC 2397).
        return _decode_base64(unquote(data), limits=limits, param=param)
    if len(data) > 3 * limits.max_image_bytes:
        raise _too_many_bytes(limits, param)
    if not data.encode("ascii", "replace").translate(None, _BASE64_CHARS):
        # No image, not even a plain-text PPM, is one word of such characters.
        what = "the data: URL is not marked as base64; write ;base64 before its comma"
        raise APIError(what, param=param, code="invalid_image_url")
    return unquote_to_bytes(data)


def _decode_base64(text: str, *, limits: Limits, param: str | None) -> bytes:
    if len(text) > 1.4 * limits.max_image_bytes + 1024:
        raise _too_many_bytes(limits, param)
    # The standard library's decoder takes ten times as long, and other threads wait for it.
    # Removing line breaks that are not there would take as long as decoding.
    with contextlib.suppress(ValueError):
        return pybase64.b64decode(text, validate=True)
    lines = text.split()
    # Where `+` was decoded as a blank, a photograph without it could still be readable.
    if "\n" not in text and any(len(line) % 4 for line in islice(lines, len(lines) - 1)):
        what = "the base64 of the image has blanks; send + as it is, or as %2B"
        raise APIError(what, param=param, code="invalid_base64")
    joined = "".join(lines)
    try:
        return pybase64.b64decode(joined + "=" * (-len(joined) % 4), validate=True)
    except ValueError:
        stray = joined.encode("ascii", "replace").translate(None, _BASE64_CHARS)[:1].decode()
        why = f"it has the character {stray}" if stray else "it is cut off, or padded inside"
        what = f"the image is not valid base64: {why}"
        raise APIError(what, param=param, code="invalid_base64") from None


def _too_many_bytes(limits: Limits, param: str | None) -> APIError:
    return APIError(
        f"the image has more than {limits.max_image_bytes:,} bytes",
        param=param, code="image_too_large",
    )  # fmt: skip
