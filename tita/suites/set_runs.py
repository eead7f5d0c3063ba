"""Question files of sets, with the paths of their images, and one results file per method."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tita.bench.methods import Method
from tita.bench.questions import BenchmarkItem, write_items
from tita.bench.request_body import GenerationOptions
from tita.bench.suites import suite_names
from tita.bench.tasks import BenchmarkTask
from tita.errors import TitaError
from tita.records import IMAGE_SUFFIXES
from tita.suites.catalog import SETS, EvaluationSet, FoundSet

QUESTIONS = "questions.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedSet:
    """A set whose question file is written."""

    set: EvaluationSet
    folder: Path
    """Of the question file and the results files."""
    images: Path
    """Folder that image paths are relative to."""
    num_questions: int

    def results(self, method: Method) -> Path:
        """The results file of a method."""
        return self.folder / f"{method.slug}.jsonl"

    def task(self, method: Method, *, limit: int | None) -> BenchmarkTask:
        """The questions, asked by a method."""
        return BenchmarkTask(
            questions=self.folder / QUESTIONS,
            images=self.images,
            out=self.results(method),
            limit=limit,
            generation=GenerationOptions(max_new_tokens=self.set.max_new_tokens, method=method),
        )


class ImageIndex:
    """The image files below a folder, links to folders included, found by the end of their path."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._by_name: dict[str, list[str]] = {}
        for path in sorted(_files_below(root)):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                self._by_name.setdefault(path.name, []).append(path.relative_to(root).as_posix())

    def find(self, name: str, *, near: Path) -> str | None:
        """Path below the root of the file with this name or end of path.

        Where no path ends so, the only file with the last part of the name is taken. Of several,
        such as the `image.png` of other questions, none is.

        Args:
            near: of several files, those below this folder are preferred.
        """
        found = self._by_name.get(name.rpartition("/")[2], [])
        exact = [path for path in found if ends_with(path, name)]
        own = near.relative_to(self._root).as_posix()
        candidates = exact or found
        preferred = [path for path in candidates if path.startswith(f"{own}/") or own == "."]
        candidates = preferred or candidates
        return candidates[0] if exact or len(candidates) == 1 else None


def _files_below(root: Path) -> Iterator[Path]:
    """All files; folders of many images are often links to where they are."""
    visited: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in visited:  # a link to a folder above it
            subfolders.clear()
            continue
        visited.add(identity)
        subfolders.sort()
        yield from (Path(folder, name) for name in names)


def ends_with(path: str, name: str) -> bool:
    """Whether the parts of `name` are the last ones of `path`."""
    return f"/{path}".endswith(f"/{name}")


def prepare_set(found: FoundSet, *, source: Path, out: Path, index: ImageIndex) -> PreparedSet:
    """Write a set's question file, with image paths below the folder of the published files.

    Images that stand in the published files are written beside the question file.

    Raises:
        TitaError: the files have another format, or an image is missing.
    """
    folder = out / found.set.name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        items = list(found.set.read(found.folder, out=folder))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise _other_format(found.set.title, error, where=found.folder) from error
    is_written = any((folder / image).is_file() for item in items for image in item.images[:1])
    images = folder if is_written else source
    if not is_written:
        items = _with_paths(items, near=found.folder, index=index, title=found.set.title)
    num = write_items(folder / QUESTIONS, items)
    return PreparedSet(set=found.set, folder=folder, images=images, num_questions=num)


def prepare_named(name: str, *, source: Path, out: Path) -> int:
    """Write the question file of a set and what is scored with it; returns the number of questions.

    Raises:
        TitaError: there is no such set, or its files have another format.
    """
    if name not in SETS:
        known = ", ".join(sorted({*SETS, *suite_names()}))
        raise TitaError(f"unknown suite {name!r}", remedy=f"choose one of {known}, unpack")
    if not source.is_dir():
        raise TitaError("no such folder", where=str(source), remedy="check --source")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        return write_items(out, SETS[name].read(source, out=out.parent))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise _other_format(SETS[name].title, error, where=source) from error


def _other_format(title: str, error: Exception, *, where: Path) -> TitaError:
    return TitaError(
        f"a record does not have {title}'s published format ({type(error).__name__}: {error})",
        where=str(where),
        remedy="give the published files",
    )


def _with_paths(
    items: Iterable[BenchmarkItem], *, near: Path, index: ImageIndex, title: str
) -> list[BenchmarkItem]:
    located = list(items)
    names = dict.fromkeys(image for item in located for image in item.images)
    known = {name: index.find(name, near=near) for name in names}
    times = Counter(known.values())
    missing = [
        name
        for name, path in known.items()
        # A file that stands in for several images is none of them.
        if path is None or (times[path] > 1 and not ends_with(path, name))
    ]
    if missing:
        raise TitaError(
            f"{len(missing)} images of {title} are missing: {', '.join(missing[:3])}",
            where=str(near),
            remedy="put the images anywhere below --source",
        )
    return [
        replace(item, images=tuple(known[image] or "" for image in item.images)) for item in located
    ]


def tasks_of(
    sets: Sequence[PreparedSet], methods: Sequence[Method], *, limits: Mapping[str, int | None]
) -> list[BenchmarkTask]:
    """One task per method and set, method by method, so that models are loaded once each."""
    return [
        each.task(method, limit=limits.get(each.set.name)) for method in methods for each in sets
    ]
