"""Opening images that other people made: whole, of bearable size, and as RGB."""

import io
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tita.errors import TitaError

if TYPE_CHECKING:
    from PIL.Image import Image

Picture: TypeAlias = "Image | Path"
"""An image, or the file of one, which is opened when it is needed."""

MAX_PIXELS = 64_000_000
"""An image with more pixels is taken for a decompression bomb (A0 at 150 dpi has 35 million)."""
MAX_RATIO = 200
"""Of an image's sides, as Qwen2-VL has it. Processors that bring the shorter side to a fixed length
make gigabytes of a line that is a hundred bytes as a file."""


def open_image(source: Path | bytes, *, where: str | None = None) -> "Image":
    """The decoded image as RGB, upright as its EXIF data says, transparency on white.

    Args:
        source: a file, or the bytes of one.
        where: how errors name it; the path if not given.

    Raises:
        TitaError: missing, unreadable, truncated, or a decompression bomb.
    """
    import PIL.Image
    import PIL.ImageOps

    name = where or (str(source) if isinstance(source, Path) else "image")
    try:
        with warnings.catch_warnings():
            # Pillow's own bound only warns up to twice its size; ours is checked below.
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            image = PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        _check_size(image, where=name)
        image.load()
        return _to_rgb(PIL.ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise TitaError("no such image", where=name, remedy="check the path") from None
    except PIL.Image.DecompressionBombError:
        raise TitaError("a decompression bomb", where=name, remedy="scale it down") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        reason = "truncated" if "truncated" in str(error) else "not a readable image"
        raise TitaError(reason, where=name, remedy="replace the file") from None


def decoded(picture: Picture) -> "Image":
    """The picture as an image whose pixels are there.

    Raises:
        TitaError: it cannot be read.
    """
    if isinstance(picture, Path):
        return open_image(picture)
    try:
        # Pillow decodes when pixels are wanted first, which is too late to tell whose they are.
        picture.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise TitaError(f"an image cannot be read ({error})", remedy="replace it") from None
    return picture


def _check_size(image: "Image", *, where: str) -> None:
    shorter, longer = sorted(image.size)
    size = f"{image.width} x {image.height} pixels"
    if shorter * longer > MAX_PIXELS:
        what, remedy = f"{size} are more than {MAX_PIXELS:,}", "scale the image down"
        raise TitaError(what, where=where, remedy=remedy)
    if longer > MAX_RATIO * shorter:
        what = f"{size}: one side is more than {MAX_RATIO} times the other"
        raise TitaError(what, where=where, remedy="cut the image")


def _to_rgb(image: "Image") -> "Image":
    import PIL.Image

    if image.mode.startswith("I;16"):
        import numpy as np

        # Pillow cuts at 255, which leaves nothing but white.
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = PIL.Image.new("RGBA", layer.size, "white")
    return PIL.Image.alpha_composite(white, layer).convert("RGB")


def pad_to_square(image: "Image", *, fill: tuple[int, int, int] = (122, 116, 104)) -> "Image":
    """The image centred on a square, as LLaVA-1.5's `expand2square` does it.

    What would make a square of more than `MAX_PIXELS` is scaled down before, far above the size at
    which any model looks.

    Args:
        image: RGB.
        fill: colour of the added bars; the default is CLIP's mean colour in 8 bits.
    """
    import PIL.Image

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
