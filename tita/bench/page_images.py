"""Images of questions on report pages: found in a folder, or counted as missing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tita.terminal import counted


@dataclass(slots=True)
class ImageFolder:
    """A folder that image paths of results files are relative to."""

    path: Path
    missing: set[str] = field(default_factory=set)
    """Images of shown questions that are not in the folder."""

    def first_of(self, record: Mapping[str, Any]) -> Path | None:
        """The first image of a question; None if it has none or the file is missing."""
        names = record.get("images") or ([record["image"]] if record.get("image") else [])
        if not names:
            return None
        path = self.path / str(names[0])
        if path.is_file():
            return path
        self.missing.add(str(names[0]))
        return None

    def complaint(self) -> str:
        """Which images are missing, in one sentence; empty if none is."""
        if not self.missing:
            return ""
        first = sorted(self.missing)[0]
        return (
            f"{counted(len(self.missing), 'image')} not found in {self.path}, such as {first}; "
            "give --images FOLDER."
        )
