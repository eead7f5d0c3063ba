"""Looking for every fault of a dataset in one go, before any job meets the first of them."""

import hashlib
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tita.data.convert import Picture, is_pair, pair_of, question_of
from tita.data.dataset import find_image, unpacked_name
from tita.data.rows import Row, rows_of
from tita.errors import TitaError
from tita.recipes import ImageAspect
from tita.terminal import Advance
from tita.vlm import (
    Prompt,
    adds_special_tokens,
    aspect_of,
    load_processor,
    locate_model,
    open_image,
    pad_to_square,
    prompt_text,
    silence_transformers,
    translate_load_errors,
)

_MAX_HINTS = 20
"""Looking for the name of an image in other letters reads a whole folder: so often at most."""


class Measure(Protocol):
    """Tokens of a question about an image of this size (pixels) with the longest of its answers."""

    def __call__(
        self, question: str, answers: Sequence[str], *, size: tuple[int, int] | None
    ) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """How long a row may be for a model."""

    tokens: int
    measure: Measure


@dataclass(slots=True, kw_only=True)
class Tally:
    """What was found so far."""

    num_questions: int = 0
    num_pairs: int = 0
    num_images: int = 0
    longest: int = 0
    """Tokens of the longest row, where there is a model to count by."""
    faults: Counter[str] = field(default_factory=Counter)
    """Numbers of faults by kind."""

    @property
    def num_faults(self) -> int:
        return self.faults.total()

    def add(self, fault: TitaError) -> None:
        """Count a fault under what it says without its names and numbers."""
        self.faults[re.sub(r"'[^']*'|\"[^\"]*\"|[\d,]*\d", "…", fault.what)[:80]] += 1


class Digests:
    """A set of texts that remembers eight bytes of each: about nine bytes of memory a text.

    Sorted arrays, many and so short ones, in place of a `set` with its hundred bytes an entry. Two
    of a hundred million texts fall together with a probability of 3e-4.
    """

    def __init__(self) -> None:
        from array import array

        self._shelves = [array("Q") for _ in range(4096)]

    def add(self, text: str) -> bool:
        """Whether the text is new."""
        digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
        shelf = self._shelves[digest >> 52]
        place = bisect_left(shelf, digest)
        if place < len(shelf) and shelf[place] == digest:
            return False
        shelf.insert(place, digest)
        return True


def find_faults(
    path: Path,
    *,
    images: Path,
    tally: Tally,
    limit: Limit | None = None,
    advance: Advance | None = None,
) -> Iterator[TitaError]:
    """Every fault of the rows at `path`, in their order; each names its place.

    An object with `chosen` is a pair, any other a question. Each image is opened once, and its head
    again where lengths are looked at. Memory grows by nine bytes a row with an id, nine an image.

    Args:
        path: what `open_dataset` takes.
        images: what image paths start from.
        tally: counts, kept up to date.
        limit: look at the rows' lengths too.
        advance: called for each row.
    """
    looking = _Looking(images=images, tally=tally, limit=limit)
    for row in rows_of(path):
        try:
            looking.at(row)
        except TitaError as fault:
            tally.add(fault)
            yield fault
        if advance is not None:
            advance()


@dataclass(slots=True, kw_only=True)
class _Looking:
    images: Path
    tally: Tally
    limit: Limit | None
    seen: Digests = field(default_factory=Digests)
    opened: Digests = field(default_factory=Digests)
    num_hints: int = 0
    picture: Picture | None = None
    """The picture of the row at hand, as it stands there."""

    def at(self, row: Row) -> None:
        """Count one row, and raise its first fault."""
        self.picture = None
        values = row.read()
        if is_pair(values):
            pair = pair_of(row, place=self._place)
            self.tally.num_pairs += 1
            identifier, name = pair.id, pair.image
            question, answers = pair.question, [pair.chosen, pair.rejected]
        else:
            asked = question_of(row, place=self._place)
            self.tally.num_questions += 1
            identifier, name = asked.id, asked.image or ""
            question, answers = asked.text, []
        if identifier != row.id and not self.seen.add(f"{row.file} {identifier}"):
            raise TitaError(
                f"id {identifier!r} stands in the file before", where=row.where, remedy="rename"
            )
        size = self._look_at_image(name, where=row.where) if name else None
        self._look_at_length(question, answers, size=size, where=row.where)

    def _place(self, picture: Picture, row: Row) -> str:
        self.picture = picture
        if isinstance(picture, bytes):
            return unpacked_name(picture)
        return find_image(picture, images=self.images, beside=row.file.parent) or picture

    def _look_at_image(self, name: str, *, where: str) -> tuple[int, int] | None:
        """Open an image that was not opened before; its size where that is asked for."""
        source = self.picture if isinstance(self.picture, bytes) else self.images / name
        if not self.opened.add(name):
            return None if self.limit is None else _size_of(source, where=where)
        if isinstance(source, Path):
            self._look_at_file(source, name, where=where)
        try:
            with open_image(source) as image:
                self.tally.num_images += 1
                return image.size
        except TitaError as fault:
            what = fault.what if isinstance(source, bytes) else f"{name!r}: {fault.what}"
            raise TitaError(f"image {what}", where=where, remedy=fault.remedy) from None

    def _look_at_file(self, path: Path, name: str, *, where: str) -> None:
        try:
            inside = path.resolve().is_relative_to(self.images.resolve())
        except (OSError, RuntimeError):  # before Python 3.13 a loop is a RuntimeError
            raise TitaError(
                f"image {name!r} is a link that leads nowhere",
                where=where,
                remedy="copy the file instead",
            ) from None
        if not inside:
            raise TitaError(
                f"image {name!r} is a link that leaves its folder",
                where=where,
                remedy="copy the file instead",
            )
        if path.is_dir():
            raise TitaError(f"image {name!r} is a folder", where=where, remedy="name a file")
        if not path.exists() and self.num_hints < _MAX_HINTS:
            self.num_hints += 1
            near = _in_other_letters(path)
            if near:
                raise TitaError(
                    f"no such image: {name!r}, but there is {near!r}",
                    where=where,
                    remedy="write the name as the file has it",
                )

    def _look_at_length(
        self,
        question: str,
        answers: Sequence[str],
        *,
        size: tuple[int, int] | None,
        where: str,
    ) -> None:
        if self.limit is None:
            return
        found = self.limit.measure(question, answers, size=size)
        self.tally.longest = max(self.tally.longest, found)
        if found > self.limit.tokens:
            raise TitaError(
                f"{found} tokens with its image, the model takes {self.limit.tokens}",
                where=where,
                remedy="shorten or drop it, or train with --set too_long=drop",
            )


def _size_of(source: Path | bytes, *, where: str) -> tuple[int, int] | None:
    """The size of an image that was looked at before; None where that found no image."""
    import io

    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError):
        return None


def _in_other_letters(path: Path) -> str | None:
    """The name of a file that differs from `path`'s in upper and lower case alone."""
    wanted = path.name.casefold()
    if not path.parent.is_dir():
        return None
    return next((one.name for one in path.parent.iterdir() if one.name.casefold() == wanted), None)


def limit_of(
    where: str, *, max_length: int | None = None, image_aspect: ImageAspect = "auto"
) -> Limit:
    """The limit of the model at `where`; its weights are not loaded.

    Args:
        where: a tree in the store, a path, or a hub name.
        max_length: tokens of prompt and answer; the model's context if not given.
        image_aspect: see `tita.vlm.aspect_of`.

    Raises:
        TitaError: nothing there, or it does not say how long its context is.
    """
    from transformers import AutoConfig

    silence_transformers()
    source = locate_model(where)
    with translate_load_errors(where):
        processor = load_processor(source, where=where)
        config = AutoConfig.from_pretrained(source)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if max_length is None and context is None:
        raise TitaError(
            "does not say how long its context is", where=where, remedy="give --max-length"
        )
    tokens = min(n for n in (max_length, context) if n is not None)
    pad = aspect_of(config, wanted=image_aspect) == "pad"
    return Limit(tokens=tokens, measure=_Counting(processor, where=where, pad=pad))


class _Counting:
    """Counts text by the tokenizer, and the tokens of an image once for each size."""

    def __init__(self, processor: Any, *, where: str, pad: bool) -> None:
        self._processor = processor
        self._where = where
        self._pad = pad
        self._extra: dict[tuple[int, int], int] = {}

    def __call__(
        self, question: str, answers: Sequence[str], *, size: tuple[int, int] | None
    ) -> int:
        import PIL.Image

        tokenizer = self._processor.tokenizer
        # A template looks at whether there is an image, not at its pixels.
        images = (PIL.Image.new("RGB", (1, 1)),) if size else ()
        text = prompt_text(self._processor, Prompt(text=question, images=images), where=self._where)
        total = len(self._marked(text))
        if answers:
            ended = [answer + (tokenizer.eos_token or "") for answer in answers]
            total += max(map(len, tokenizer(ended, add_special_tokens=False)["input_ids"]))
        return total + (self._extra_of(size) if size else 0)

    def _extra_of(self, size: tuple[int, int]) -> int:
        """Tokens that an image of this size puts in place of the one that marks it."""
        import PIL.Image

        if size not in self._extra:
            image = PIL.Image.new("RGB", size)
            shown = pad_to_square(image) if self._pad else image
            text = prompt_text(
                self._processor, Prompt(text="?", images=(shown,)), where=self._where
            )
            begins = adds_special_tokens(self._processor, text)
            whole = self._processor(text=[text], images=[[shown]], add_special_tokens=begins)
            self._extra[size] = len(whole["input_ids"][0]) - len(self._marked(text))
        return self._extra[size]

    def _marked(self, text: str) -> list[int]:
        """Tokens of a prompt in which one stands for an image yet."""
        begins = adds_special_tokens(self._processor, text)
        found: list[int] = self._processor.tokenizer(text, add_special_tokens=begins)["input_ids"]
        return found
