"""Images that stand in a row as text: `data:` URLs, and PNG, JPEG, GIF and WebP in base64."""

import base64
import binascii
import re
from pathlib import Path

_DATA_URL = re.compile(r"data:image/[\w.+-]+(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.I)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+=*\s*")
_FIRST_CHARS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
"""First characters of PNG, JPEG, GIF and WebP files in base64."""
_MIN_CHARS = 64
"""A shorter text is a path: no image is that small."""
_SIGNS = re.compile(rb"(?i:data:image)|iVBORw0KGgo|\\?/9j\\?/|R0lGOD|UklGR")
"""What a file contains that has embedded images; JSON may escape slashes."""
_SIGN_BYTES = 16
_BLOCK_BYTES = 1 << 20


def embedded_content(text: str) -> str | None:
    """The base64 of an image that a text holds; None if the text is a path or another URL."""
    if found := _DATA_URL.match(text):
        return text[found.end() :]
    stripped = text.strip()
    is_content = stripped.startswith(_FIRST_CHARS) and len(stripped) >= _MIN_CHARS
    return stripped if is_content and _BASE64.fullmatch(stripped) else None


def decode_base64(text: str) -> bytes | None:
    """The bytes that a text encodes; None if it is not base64 or not complete."""
    try:
        return base64.b64decode("".join(text.split()), validate=True) or None
    except binascii.Error:
        return None


def may_embed_images(content: bytes) -> bool:
    """Whether a text may have embedded images; rarely, one without them looks like it."""
    return _SIGNS.search(content) is not None


def file_may_embed_images(file: Path) -> bool:
    """The same for a text file; a missing one has none."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        tail = b""
        while block := opened.read(_BLOCK_BYTES):
            if may_embed_images(tail + block):
                return True
            tail = block[-_SIGN_BYTES:]
    return False
