"""Messages of OpenAI's chat completions API, with images as `data:` URLs. Imports no torch."""

import base64
import io
import mimetypes
from collections.abc import Sequence
from typing import Any

import PIL.Image

from tita.records import IMAGE_FORMATS, ContextTurn, turns_of


def chat_messages(
    context: Sequence[ContextTurn], question: str, urls: Sequence[str]
) -> list[dict[str, Any]]:
    """A question after its context, each image in the turn and at the place where it is shown.

    A turn without images is a plain text, as every endpoint reads it.

    Args:
        context: the turns before the question.
        question: its text.
        urls: of the images of all turns, in order.
    """
    messages, start = [], 0
    for turn in turns_of(context, question, num_images=len(urls)):
        shown = [image_part(url) for url in urls[start : start + turn.num_images]]
        start += turn.num_images
        content: Any = [
            {"type": "text", "text": part} if isinstance(part, str) else part
            for part in turn.parts(shown)
        ]
        messages.append({"role": turn.role, "content": content if shown else turn.text})
    return messages


def image_part(url: str) -> dict[str, Any]:
    """The part of a message that shows an image."""
    return {"type": "image_url", "image_url": {"url": url}}


def data_url(content: bytes, *, name: str = "") -> str:
    """The bytes of an image, unchanged, as a `data:` URL (RFC 2397).

    Args:
        name: of its file, whose suffix tells the type that the bytes do not.
    """
    kind = media_type(content) or mimetypes.guess_type(name)[0] or "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def media_type(content: bytes) -> str | None:
    """The media type of an image by its first bytes; None for a format that is not read here."""
    try:
        with PIL.Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            return image.get_format_mimetype()
    except Exception:
        # Pillow raises many kinds of exceptions, also one about a file that is a large image.
        return None
