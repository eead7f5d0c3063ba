"""Images of questions on report pages: small copies, or counted as missing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image

from tita.errors import TitaError
from tita.terminal import counted
from tita.vlm.images import open_image

_SIDE = 640
"""Pixels per side; a page has dozens of images."""


@dataclass(slots=True)
class ImageFolder:
    """A folder that image paths of results files are relative to."""

    path: Path
    missing: set[str] = field(default_factory=set)
    """Images of shown questions that are not in the folder, or cannot be decoded."""

    def first_of(self, record: Mapping[str, Any]) -> Image | None:
        """The first image of a question; None if it has none or it is missing."""
        names = record.get("images") or ([record["image"]] if record.get("image") else [])
        if not names:
            return None
        try:
            image = open_image(self.path / str(names[0]))
        except TitaError:  # an endpoint may read formats that are not read here
            self.missing.add(str(names[0]))
            return None
        image.thumbnail((_SIDE, _SIDE))
        return image

    def complaint(self) -> str:
        """Which images are missing, in one sentence; empty if none is."""
        if not self.missing:
            return ""
        first = sorted(self.missing)[0]
        return (
            f"{counted(len(self.missing), 'image')} not found or not readable in {self.path}, such "
            f"as {first}; give --images FOLDER."
        )
