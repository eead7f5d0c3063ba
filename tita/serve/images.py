"""Taking in the images of a request: base64, `data:` URLs, and allowed hosts."""

import base64
import binascii
import io
import warnings
from typing import TYPE_CHECKING
from urllib.parse import unquote, unquote_to_bytes

from tita.errors import TitaError
from tita.serve.failures import Refusal, encodable
from tita.serve.options import Limits
from tita.serve.remote import Fetcher
from tita.vlm import open_image

if TYPE_CHECKING:
    from PIL.Image import Image


def image_from_url(
    url: str, *, limits: Limits, fetcher: Fetcher, param: str | None = None
) -> "Image":
    """The image at a `data:` or http(s) URL. Blocks; call it in a thread.

    Raises:
        Refusal: not allowed, too large, or no image.
    """
    if url != encodable(url):
        raise Refusal("the URL is no Unicode", param=param, code="invalid_image_url")
    url = url.strip()
    scheme = url[:8].lower()
    if scheme.startswith("data:"):
        return decode(_from_data_url(url, limits=limits, param=param), limits=limits, param=param)
    if scheme.startswith(("http://", "https://")):
        content = fetcher.fetch(url, max_bytes=limits.max_image_bytes, param=param)
        return decode(content, limits=limits, param=param)
    raise Refusal(
        "an image is given as a data: URL or by http(s)", param=param, code="invalid_image_url"
    )


def image_from_base64(text: str, *, limits: Limits, param: str | None = None) -> "Image":
    """The image in a base64 string. Blocks; call it in a thread."""
    return decode(_from_base64(text, limits=limits, param=param), limits=limits, param=param)


def decode(content: bytes, *, limits: Limits, param: str | None = None) -> "Image":
    """The image in the bytes of a file, its size checked before a pixel is unpacked.

    Raises:
        Refusal: too large, truncated, a bomb, or no image.
    """
    import PIL.Image

    if len(content) > limits.max_image_bytes:
        raise _too_large(limits, param)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(io.BytesIO(content)) as header:
                num_pixels = header.width * header.height
        if num_pixels > limits.max_pixels:
            raise Refusal(
                f"the image has {num_pixels:,} pixels, more than {limits.max_pixels:,}",
                param=param, code="image_too_large",
            )  # fmt: skip
        return open_image(content, where="image")
    except (Refusal, MemoryError):
        raise
    except PIL.Image.DecompressionBombError:
        message = f"the image has more than {limits.max_pixels:,} pixels"
        raise Refusal(message, param=param, code="image_too_large") from None
    except TitaError as error:
        raise Refusal(error.what, param=param, code="invalid_image") from None
    except Exception:
        # Decoders of forty formats fail in as many ways on bytes made to make them fail.
        raise Refusal("not a readable image", param=param, code="invalid_image") from None


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
