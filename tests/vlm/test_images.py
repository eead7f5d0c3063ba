"""Decoding of images, and size limits."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tita.errors import TitaError
from tita.vlm.images import MAX_PIXELS, MAX_RATIO, open_image, pad_to_square


def png(image: PIL.Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("size", [(1, 40_000), (40_000, 1), (10, 10 * MAX_RATIO + 1)])
def test_extreme_aspect_is_refused(tmp_path: Path, size: tuple[int, int]):
    """A square of its longer side would take gigabytes."""
    path = tmp_path / "line.png"
    path.write_bytes(png(PIL.Image.new("L", size)))
    with pytest.raises(TitaError, match=f"{size[0]} x {size[1]} pixels.*200 times") as caught:
        open_image(path)
    assert caught.value.where == str(path)


def test_long_images_are_padded_to_a_bounded_square():
    long = PIL.Image.new("RGB", (200, 20_000), "white")
    long.paste("red", (0, 10_000, 200, 20_000))
    square = pad_to_square(long)
    assert square.width == square.height
    assert MAX_PIXELS - 2 * square.width < square.width**2 <= MAX_PIXELS
    middle = square.width // 2
    assert square.getpixel((middle, 10)) == (255, 255, 255)
    assert square.getpixel((middle, square.height - 10)) == (255, 0, 0)
    assert square.getpixel((0, 0)) == (122, 116, 104)
    assert long.size == (200, 20_000), "the image itself stays as it was"


def test_16_bit_grey_is_scaled():
    deep = np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)
    shallow = np.asarray(open_image(png(PIL.Image.fromarray(deep))))
    assert (shallow == (deep >> 8)[..., None]).all()
