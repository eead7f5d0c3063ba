"""Decoding of images, and size limits."""

import errno
import io
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import tita
from tita.errors import TitaError
from tita.vlm.images import MAX_PIXELS, MAX_RATIO, open_image, pad_to_square, read_size


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


RAMP = np.linspace(0, 1, 1200).reshape(30, 40)
DEEP = {
    "16 bits": ((RAMP * 65535).astype(np.uint16), "I;16"),
    "32 bits": ((RAMP * (2**31 - 1)).astype(np.int32), "I"),
    "16 bits in 32": ((RAMP * 65535).astype(np.int32), "I"),
    "8 bits in 32": ((RAMP * 255).astype(np.int32), "I"),
    "float up to 1": (RAMP.astype(np.float32), "F"),
    "float up to 255": ((RAMP * 255).astype(np.float32), "F"),
    "float up to 65535": ((RAMP * 65535).astype(np.float32), "F"),
    "elevations": ((RAMP * 9000 - 400).astype(np.float32), "F"),
    "nothing but black": (np.zeros((30, 40), np.float32), "F"),
}


@pytest.mark.parametrize(("kind", "stored_as"), [("16 bits", "PNG"), *((k, "TIFF") for k in DEEP)])
def test_deep_grey_is_scaled(kind: str, stored_as: str):
    values, mode = DEEP[kind]
    out = io.BytesIO()
    PIL.Image.fromarray(values).save(out, stored_as)
    assert PIL.Image.open(io.BytesIO(out.getvalue())).mode == mode
    grey = np.asarray(open_image(out.getvalue()))[..., 0].astype(int)
    wanted = RAMP * 255 * (kind != "nothing but black")
    assert np.abs(grey - wanted).max() <= 1.01


def test_not_a_number_is_black():
    values = RAMP.astype(np.float32)
    values[0, :2] = (np.nan, np.inf)
    out = io.BytesIO()
    PIL.Image.fromarray(values).save(out, "TIFF")
    grey = np.asarray(open_image(out.getvalue()))[..., 0]
    assert grey[0, 0] == grey[0, 1] == 0
    assert grey[-1, -1] == 255


def test_formats_that_run_programs_are_refused(tmp_path: Path):
    """Pillow reads EPS with Ghostscript; here `gs` is a program that only leaves a trace."""
    out = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), "red").save(out, "EPS")
    (tmp_path / "a.jpg").write_bytes(out.getvalue())
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    (tmp_path / "q.jsonl").write_text('{"text": "What?", "image": "a.jpg"}\n')
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "tita", "data", "validate", str(tmp_path)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert not (tmp_path / "started").exists()
    assert ended.returncode == 2
    assert "'a.jpg': not a readable image; replace the file, for example by a JPEG" in ended.stdout


def test_every_module_decodes_the_same_formats():
    """`formats=` stands wherever a file is opened."""
    package = Path(tita.__file__).parent
    opened = re.compile(r"Image\.open\(((?:[^()]|\([^()]*\))*)\)")
    found = {
        (path.name, call)
        for path in package.rglob("*.py")
        for call in opened.findall(path.read_text())
    }
    assert len(found) >= 5
    assert {call for call in found if "formats=IMAGE_FORMATS" not in call[1]} == set()


def turned_jpeg(exif: bytes) -> bytes:
    """A file of 40 by 20 pixels, red on the left."""
    image = PIL.Image.new("RGB", (40, 20), "white")
    image.paste("red", (0, 0, 20, 20))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95, exif=exif)
    return out.getvalue()


def test_unusual_exif_tags_do_not_spoil_an_image():
    """ResolutionUnit as a fraction, which Pillow reads and cannot write; and what is no EXIF."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x0128, 5, 1, 38)
    odd = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries + struct.pack("<III", 0, 2, 1)
    upright = open_image(turned_jpeg(odd))
    assert upright.size == read_size(turned_jpeg(odd), where="a.jpg") == (20, 40)
    assert upright.getpixel((10, 5))[1] < 60 < 200 < upright.getpixel((10, 35))[1]
    for damaged in (b"Exif\0\0no TIFF header", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        assert open_image(turned_jpeg(damaged)).size == (40, 20)
        assert read_size(turned_jpeg(damaged), where="a.jpg") == (40, 20)


def test_a_file_that_must_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.png"
    path.write_bytes(png(PIL.Image.new("RGB", (8, 8))))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    # Root, which tests may run as, reads everything.
    monkeypatch.setattr(PIL.Image, "open", refuse)
    with pytest.raises(TitaError, match=r"a\.png: permission denied; check the file and its perm"):
        open_image(path)
