"""Opening images, checking their size, and the aspect in which a model sees them."""

import contextlib
import io
import json
import math
import struct
import warnings
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import PIL.Image
import PIL.ImageOps
from PIL.Image import Image

from tita.errors import TitaError
from tita.recipes import ImageAspect
from tita.records import IMAGE_FORMATS
from tita.storage.image_shards import read_image

Picture: TypeAlias = Image | Path
"""An image, or the file of one, which is opened when it is needed."""

Aspect = Literal["pad", "keep"]
"""`pad` adds bars that make an image square; `keep` leaves it as it is."""

MAX_PIXELS = 64_000_000
"""An image with more pixels is refused as a decompression bomb (A0 at 150 dpi has 35 million)."""
MAX_RATIO = 200
"""Maximum ratio of the longer to the shorter side, as in Qwen2-VL. Processors that scale the
shorter side to a fixed length would turn a narrow image of a hundred bytes into gigabytes."""

_ASPECT_KEY = "image_aspect_ratio"
"""Key in `config.json`, as in LLaVA's own checkpoints (`llava/train/train.py`)."""
_LLAVA_ASPECTS: dict[Aspect, str] = {"pad": "pad", "keep": "square"}


def open_image(source: str | Path | bytes, *, where: str | None = None) -> Image:
    """The decoded image as RGB, upright as its EXIF data says, transparency on white.

    Grey values of more than 8 bits are scaled to 8; only formats in `IMAGE_FORMATS` are read.

    Args:
        source: a file, which may be in a shard, or the bytes of one.
        where: its name in errors; the path if not given.

    Raises:
        TitaError: missing, unreadable, truncated, or a decompression bomb.
    """
    name = where or ("image" if isinstance(source, bytes) else str(source))
    try:
        with warnings.catch_warnings():
            # Below twice Pillow's own limit it only warns; `_check_size` enforces ours.
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            file = io.BytesIO(source) if isinstance(source, bytes) else Path(source)
            if isinstance(file, Path) and not file.is_file():
                file = io.BytesIO(read_image(file))
            image = PIL.Image.open(file, formats=IMAGE_FORMATS)
        _check_size(image, where=name)
        image.load()
        _turn_upright(image)
        return _to_rgb(image)
    except (MemoryError, TitaError):
        raise
    except FileNotFoundError:
        raise TitaError("no such image", where=name, remedy="check the path") from None
    except PIL.Image.DecompressionBombError:
        raise TitaError("a decompression bomb", where=name, remedy="scale it down") from None
    except Exception as error:
        # Pillow's decoders raise many kinds of exceptions on malformed files.
        reason = "truncated" if "truncated" in str(error) else "not a readable image"
        remedy = "replace the file, for example by a JPEG or PNG"
        if isinstance(error, OSError) and error.strerror:
            reason, remedy = error.strerror.lower(), "check the file and its permissions"
        raise TitaError(reason, where=name, remedy=remedy) from None


_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
"""EXIF orientations by which an upright image has width and height exchanged."""
_TAILS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}
"""Ends of complete files."""
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_KEYWORDS = (b"Raw profile type", b"XML:com.adobe.xmp")
"""Texts of a PNG file that Pillow takes for EXIF data or searches for an orientation."""


def read_size(data: bytes, *, where: str) -> tuple[int, int]:
    """Width and height of `open_image`'s result, from the header of a file where that tells them.

    A file that may be truncated, or whose format does not show its end, is decoded.

    Raises:
        TitaError: as `open_image`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                if _is_whole(data, image.format or ""):
                    _check_size(image, where=where)
                    width, height = image.size
                    # `exif_transpose` reads the same.
                    is_turned = image.format != "PNG" and (
                        image.getexif().get(_ORIENTATION) in _TURNED
                    )
                    return (height, width) if is_turned else (width, height)
    except MemoryError:
        raise
    except Exception:
        pass  # `open_image` reports it
    return open_image(data, where=where).size


def _is_whole(data: bytes, kind: str) -> bool:
    """Whether a file has its end, and says its orientation before the pixels, if at all."""
    if kind == "PNG":
        return data.endswith(_TAILS[kind]) and not _has_orientation(data)
    if kind == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 == len(data)
    return kind in _TAILS and data.endswith(_TAILS[kind])


def _has_orientation(png: bytes) -> bool:
    """Whether a PNG file may say its orientation, which Pillow reads with the pixels."""
    position = 8
    while position + 12 <= len(png):
        length, name = (
            int.from_bytes(png[position : position + 4]),
            png[position + 4 : position + 8],
        )
        text = png[position + 8 : position + 32]
        if name == b"eXIf" or (name in _PNG_TEXTS and text.startswith(_PNG_KEYWORDS)):
            return True
        position += length + 12
    return False


def decode_image(picture: Picture | str) -> Image:
    """Open the file if it is one, and decode the pixels.

    Raises:
        TitaError: it cannot be read.
    """
    if isinstance(picture, str | Path):
        return open_image(picture)
    try:
        # Pillow decodes at first access to the pixels; a failure there could not be attributed.
        picture.load()
    except MemoryError:
        raise
    except Exception as error:
        raise TitaError(f"an image cannot be read ({error})", remedy="replace it") from None
    return picture


def pad_to_square(image: Image, *, fill: tuple[int, int, int] = (122, 116, 104)) -> Image:
    """The image centred on a square, as LLaVA-1.5's `expand2square` does it.

    An image whose square would have more than `MAX_PIXELS` is scaled down first, to a size far
    above any model's input.

    Args:
        image: RGB.
        fill: colour of the added bars; the default is CLIP's mean colour in 8 bits.
    """
    if image.width == image.height:
        return image
    side = max(image.size)
    if side * side > MAX_PIXELS:
        side = math.isqrt(MAX_PIXELS)
        image = image.copy()
        image.thumbnail((side, side))
    square = PIL.Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def aspect_of(config: Any, *, wanted: ImageAspect = "auto") -> Aspect:
    """The aspect in which the model of this configuration sees images.

    `auto` follows the checkpoint: its `image_aspect_ratio` if it has one. Otherwise LLaVA-1.5 and
    models trained like it (type `llava` with a CLIP tower, BakLLaVA included) get bars; processors
    of other families keep or tile an image, and so does a `llava` with another tower (Pixtral).
    """
    if wanted != "auto":
        return wanted
    for aspect, word in _LLAVA_ASPECTS.items():
        if getattr(config, _ASPECT_KEY, None) == word:
            return aspect
    padded = config.model_type == "llava" and config.vision_config.model_type == "clip_vision_model"
    return "pad" if padded else "keep"


def write_aspect(folder: str | Path, aspect: Aspect) -> None:
    """Record in a saved model's `config.json` the aspect that it was trained with."""
    path = Path(folder, "config.json")
    config = json.loads(path.read_text()) | {_ASPECT_KEY: _LLAVA_ASPECTS[aspect]}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _check_size(image: Image, *, where: str) -> None:
    shorter, longer = sorted(image.size)
    size = f"{image.width} x {image.height} pixels"
    if shorter * longer > MAX_PIXELS:
        what, remedy = f"{size} are more than {MAX_PIXELS:,}", "scale the image down"
        raise TitaError(what, where=where, remedy=remedy)
    if longer > MAX_RATIO * shorter:
        what = f"{size}: one side is more than {MAX_RATIO} times the other"
        raise TitaError(what, where=where, remedy="cut the image")


def _turn_upright(image: Image) -> None:
    """Apply the orientation in an image's EXIF data; damaged data says none."""
    with contextlib.suppress(ValueError, SyntaxError, OSError, struct.error, TypeError):
        image.getexif()
    # Pillow would write the other tags again, and fails on some that it has read: cameras and
    # editors give them types of their own.
    for key in ("exif", "Raw profile type exif"):
        image.info.pop(key, None)
    PIL.ImageOps.exif_transpose(image, in_place=True)


def _to_rgb(image: Image) -> Image:
    if image.mode == "F" or image.mode.startswith("I"):
        # Pillow clips at 255, which turns most of these images white or black.
        image = PIL.Image.fromarray(_to_8_bits(np.asarray(image)))
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        # A copy of a large photograph would hold Python's global lock for milliseconds.
        return image if image.mode == "RGB" else image.convert("RGB")
    layer = image.convert("RGBA")
    white = PIL.Image.new("RGBA", layer.size, "white")
    return PIL.Image.alpha_composite(white, layer).convert("RGB")


def _to_8_bits(grey: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Grey values of 16 bits, 32 bits or floating point as 8 bits.

    A file does not say which value is white. 16-bit values have their full range. Floats up to 1
    have the range 0 to 1; other values that would fit 8 or 16 bits have the range of these types;
    and all others, for example elevations, the range from their least to their greatest value.
    """
    if grey.dtype.itemsize == 2:
        return (grey >> 8).astype(np.uint8)
    finite = np.nan_to_num(grey.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    least, greatest = min(0.0, float(finite.min())), float(finite.max())
    if least < 0 or greatest > 65535:
        finite = (finite - least) * (255 / max(greatest - least, 1e-9))
    elif grey.dtype.kind == "f" and greatest <= 1:
        finite = finite * 255
    elif greatest > 255:
        finite = finite / 256
    clipped: np.ndarray[Any, Any] = np.clip(finite, 0, 255).astype(np.uint8)
    return clipped
