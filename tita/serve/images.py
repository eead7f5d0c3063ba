"""Taking in the images of a request: base64, `data:` URLs, and allowed hosts.

Fetching one is waiting, which many can do at once; unpacking it is work, which waits for its turn.
"""

import base64
import binascii
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import unquote, unquote_to_bytes

from tita.errors import TitaError
from tita.serve.failures import Refusal, encodable
from tita.serve.options import Limits
from tita.serve.remote import Fetcher
from tita.vlm import open_image

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """An image that has come and has not been looked at."""

    content: Callable[[], bytes]
    """The bytes of its file; raises `Refusal`."""
    num_bytes: int
    """As it came."""
    limits: Limits
    param: str | None
    """Where the request has it."""

    def decoded(self) -> "Image":
        """Its pixels; the size is checked before one is unpacked.

        Raises:
            Refusal: too large, truncated, a bomb, or no image.
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
        except (Refusal, MemoryError):
            raise
        except PIL.Image.DecompressionBombError:
            raise self._refusal("the image has more than") from None
        except TitaError as error:
            raise Refusal(error.what, param=self.param, code="invalid_image") from None
        except Exception:
            # Decoders of forty formats fail in as many ways on bytes made to make them fail.
            raise Refusal("not a readable image", param=self.param, code="invalid_image") from None

    def _refusal(self, what: str) -> Refusal:
        message = f"{what} {self.limits.max_pixels:,} pixels"
        return Refusal(message, param=self.param, code="image_too_large")


def image_from_url(
    url: str, *, limits: Limits, fetcher: Fetcher, param: str | None = None
) -> EncodedImage:
    """The image at a `data:` or http(s) URL. Blocks; call it in a thread.

    Raises:
        Refusal: not allowed, or too large.
    """
    if not url.isascii() and url != encodable(url):
        raise Refusal("the URL is no Unicode", param=param, code="invalid_image_url")
    url = url.strip()
    scheme = url[:8].lower()
    if scheme.startswith("data:"):
        content = partial(_from_data_url, url, limits=limits, param=param)
        return EncodedImage(content=content, num_bytes=len(url), limits=limits, param=param)
    if scheme.startswith(("http://", "https://")):
        fetched = fetcher.fetch(url, max_bytes=limits.max_image_bytes, param=param)
        return encoded_image(fetched, limits=limits, param=param)
    raise Refusal(
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
        raise Refusal("a data: URL without data", param=param, code="invalid_image_url")
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
        raise Refusal("the image is no base64", param=param, code="invalid_base64") from None


def _too_large(limits: Limits, param: str | None) -> Refusal:
    return Refusal(
        f"the image has more than {limits.max_image_bytes:,} bytes",
        param=param, code="image_too_large",
    )  # fmt: skip
