"""Lengths of rows and digests of images: from image headers, and remembered in the store.

The processor decides how many tokens an image has by the image's size alone, so one image of each
size is processed. Some rows are counted by the processor itself and compared.

Everything is in arrays, exchanged between the ranks in blocks: 44 bytes per row and image.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch.distributed as dist
import transformers

from tita.data.image_table import ImageEntry, ImageSource, ImageTable, read_file
from tita.data.lengths import LengthLimit, TextRow
from tita.data.record_table import records_digest, take
from tita.errors import StoreUnavailable, TitaError
from tita.records import Pair, Question
from tita.storage import Store
from tita.storage.image_shards import image_version
from tita.storage.manifest import sha256_of
from tita.terminal import Advance, progress, say
from tita.train.checkpoints import retry_store
from tita.train.group import BLOCK, from_rank_0, gather, on_all_ranks, share_from_rank_0
from tita.train.negatives import Negative
from tita.train.training_data import RowFormatter, count_tokens
from tita.vlm.images import Aspect, read_size

Record = Pair | Question
_VERSION = "2"
"""Increased when the way of counting or the format of the remembered values changes."""
_CHUNK = 64
"""Rows whose texts are tokenized at once."""
_IMAGES_AT_ONCE = 1024
"""Rows of an image table that are Python objects at a time."""
_NUM_SAMPLES = 16
"""Rows of each rank that the processor counts, too."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


class ImageDigests(Mapping[str, str]):
    """SHA-256 of each image by its name."""

    def __init__(self, tables: Sequence[ImageTable], digests: Any) -> None:
        """`digests[N, 32]` are those of the images of all tables, one table after the other."""
        self._tables, self._digests = tuple(tables), digests

    def __len__(self) -> int:
        return len(self._digests)

    def __iter__(self) -> Iterator[str]:
        for table in self._tables:
            yield from table.names()

    def __getitem__(self, name: str) -> str:
        found: str = self._digests[self.number(name)].tobytes().hex()
        return found

    def number(self, name: str) -> int:
        """The number of an image among those of all tables."""
        return image_number(self._tables, name)


def image_number(tables: Sequence[ImageTable], name: str) -> int:
    """The number of an image among those of all tables, one table after the other."""
    start = 0
    for table in tables:
        if (number := table.number(name)) is not None:
            return start + number
        start += len(table)
    raise KeyError(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMeasures:
    """The lengths of rows, and the digests of their images."""

    lengths: tuple[Any, ...]
    """Of each group of rows, an array `[N, 3]`: tokens as in `RowLength`, -1 for None."""
    digests: Mapping[str, str]


def measure_rows(
    groups: Sequence[Sequence[Record]],
    *,
    images: ImageSource,
    aspect: Aspect,
    model: str,
    processor: Any,
    store: Store,
) -> RowMeasures:
    """Measure all rows, or recall what an earlier start has measured; every rank calls this.

    Each rank measures its share, rows and images `rank`, `rank + world`, ...

    Args:
        groups: pairs and questions with an image.
        images: their images.
        aspect: in which the model sees images.
        model: folder or hub name of the model of `processor`.
        store: remembers what was measured, at `cache/lengths/`.

    Raises:
        TitaError: an image is missing or unreadable, or the processor rejects it.
    """
    num_rows, num_images = sum(map(len, groups)), sum(map(len, images.tables))
    lengths = np.empty((num_rows, 3), dtype=np.int32)
    digests = np.empty((num_images, 32), dtype=np.uint8)
    key = ""

    def recall() -> bool:
        nonlocal key
        key = _key(groups, images=images, aspect=aspect, model=model)
        return _read(store, key, lengths=lengths, digests=digests)

    if from_rank_0(recall):
        share_from_rank_0(lengths)
        share_from_rank_0(digests)
        if dist.get_rank() == 0:
            say("train-dpo: lengths and image digests read from the store")
    else:
        sizes = np.empty((num_images, 2), dtype=np.int32)
        _measure_images(images, digests=digests, sizes=sizes)
        measurer = _Measurer(
            images=images, sizes=sizes, aspect=aspect, processor=processor, where=model
        )
        _measure_lengths(groups, measurer, lengths=lengths)
        on_all_ranks(lambda: _write(store, key, lengths, digests) if dist.get_rank() == 0 else None)
    ends = np.cumsum([len(group) for group in groups])[:-1]
    return RowMeasures(
        lengths=tuple(np.split(lengths, ends)), digests=ImageDigests(images.tables, digests)
    )


def _measure_images(images: ImageSource, *, digests: Any, sizes: Any) -> None:
    """Fill `digests[N, 32]` and `sizes[N, 2]`, each rank for its share."""
    rank, world, first = dist.get_rank(), dist.get_world_size(), 0
    step = _IMAGES_AT_ONCE * world
    own = sum(len(range(rank, len(table), world)) for table in images.tables)
    with progress("reading the images", total=own, unit="images") as advance:
        for table in images.tables:
            for start in range(0, len(table), step):
                stop = min(start + step, len(table))
                entries = table.entries(start, stop)[rank::world]
                shares = gather(partial(_measure_entries, images, table, entries, advance=advance))
                for number, (some, of_some) in enumerate(shares):
                    place = slice(first + start + number, first + stop, world)
                    digests[place], sizes[place] = some, of_some
            first += len(table)


def _measure_entries(
    images: ImageSource, table: ImageTable, entries: Sequence[ImageEntry], *, advance: Advance
) -> tuple[Any, Any]:
    digests = np.empty((len(entries), 32), dtype=np.uint8)
    sizes = np.empty((len(entries), 2), dtype=np.int32)
    for row, entry in enumerate(entries):
        digest, sizes[row] = _measure_image(images, table, entry)
        digests[row] = np.frombuffer(digest, dtype=np.uint8)
        advance()
    return digests, sizes


def _measure_image(
    images: ImageSource, table: ImageTable, entry: ImageEntry
) -> tuple[bytes, tuple[int, int]]:
    """SHA-256 and size of an image; the latter from its header. One that may be cut is decoded."""
    if entry.is_stored:
        size = entry.width, entry.height
        if not entry.width:
            size = read_size(table.read(entry), where=entry.name)
        return bytes.fromhex(entry.sha256), size
    path = images.folder / entry.name
    data = read_file(path)
    return hashlib.sha256(data).digest(), read_size(data, where=str(path))


def _measure_lengths(
    groups: Sequence[Sequence[Record]], measurer: "_Measurer", *, lengths: Any
) -> None:
    """Fill `lengths[N, 3]`, each rank for its share."""
    rank, world, first = dist.get_rank(), dist.get_world_size(), 0
    for group in groups:
        share = take(group, np.arange(rank, len(group), world, dtype=np.int32))
        own = np.empty((len(share), 3), dtype=np.int32)
        on_all_ranks(partial(measurer.measure, share, own))
        for start in range(0, -(-len(group) // world), BLOCK):
            for number, some in enumerate(gather(partial(np.copy, own[start : start + BLOCK]))):
                of_rank = lengths[first : first + len(group)][number::world]
                of_rank[start : start + len(some)] = some
        first += len(group)


def _names(record: Record) -> Iterable[str]:
    yield str(record.image)
    if isinstance(record, Pair) and record.rejected_image is not None:
        yield record.rejected_image


def _key(
    groups: Sequence[Sequence[Record]], *, images: ImageSource, aspect: Aspect, model: str
) -> str:
    """The store key of what is measured: of the rows, the processor, and the files of the images.

    A file counts as unchanged with the same size and modification time. In the cache of a store in
    S3 all times are the same, but there the folder's name is the digest of its content, and images
    that rows store are named by their own digests.
    """
    facts = [_VERSION, transformers.__version__, aspect, str(images.folder.absolute())]
    digest = hashlib.sha256(json.dumps([*facts, _processor_digest(model)]).encode())
    for group in groups:
        digest.update(f"{len(group)}\n".encode() + records_digest(group))
    for table in images.tables:
        for start in range(0, len(table) if table.has_files else 0, _IMAGES_AT_ONCE):
            for entry in table.entries(start, min(start + _IMAGES_AT_ONCE, len(table))):
                if entry.is_stored:
                    continue
                try:
                    version = image_version(images.folder / entry.name)
                except OSError:
                    continue  # reported when it is opened
                digest.update(f"{entry.name}\n{version}\n".encode())
    return f"cache/lengths/{digest.hexdigest()}.npz"


def _processor_digest(model: str) -> str:
    """Identifies a model's processor: its small files, or the name on the hub."""
    if not Path(model).is_dir():
        return model
    files = sorted(path for path in Path(model).rglob("*") if path.is_file())
    small = [path for path in files if path.suffix not in _WEIGHTS]
    listing = [f"{sha256_of(path)} {path.relative_to(model).as_posix()}\n" for path in small]
    return hashlib.sha256("".join(listing).encode()).hexdigest()


def _read(store: Store, key: str, *, lengths: Any, digests: Any) -> bool:
    """Fill both arrays with what is remembered; False if nothing is."""
    if not store.exists(key):
        return False
    try:
        with np.load(io.BytesIO(store.get(key)), allow_pickle=False) as body:
            for name, wanted in (("lengths", lengths), ("digests", digests)):
                found = body[name]
                if found.shape != wanted.shape:
                    raise ValueError(name)
                wanted[:] = found
    except (ValueError, KeyError, OSError, EOFError, BadZipFile):
        raise TitaError(
            "not the lengths of these rows",
            where=f"{store.uri}/{key}",
            remedy="delete it; the next run measures them again",
        ) from None
    return True


def _write(store: Store, key: str, lengths: Any, digests: Any) -> None:
    body = io.BytesIO()
    np.savez(body, lengths=lengths, digests=digests)
    try:
        retry_store(lambda: store.put(key, body.getvalue()))
    except StoreUnavailable as error:
        say(f"train-dpo: cannot remember the lengths of the rows: {error}")


@dataclass(kw_only=True)
class _Measurer:
    """Measures the rows of one rank."""

    images: ImageSource
    sizes: Any
    """Of the images of all tables, `[N, 2]`."""
    aspect: Aspect
    processor: Any
    where: str
    limit: LengthLimit = field(init=False)

    def __post_init__(self) -> None:
        self.limit = LengthLimit(
            processor=self.processor, max_tokens=0, where=self.where, pad=self.aspect == "pad"
        )

    def measure(self, records: Sequence[Record], lengths: Any) -> None:
        """Fill `lengths[N, 3]`."""
        with progress("checking the pairs", total=len(records), unit="pairs") as advance:
            row, remaining = 0, iter(records)
            while some := list(islice(remaining, _CHUNK)):
                for length in self._from_headers(some):
                    lengths[row] = length
                    row += 1
                    advance()
        samples = set(range(0, len(records), max(1, len(records) // _NUM_SAMPLES)))
        if len(records):
            samples.add(int(lengths[:, 0].argmax()))
        if any(self._by_processor(records[row]) != lengths[row].tolist() for row in samples):
            say("train-dpo: the processor counts other tokens than image sizes tell; counting all")
            with progress("counting tokens", total=len(records), unit="pairs") as advance:
                for row, record in enumerate(records):
                    lengths[row] = self._by_processor(record)
                    advance()

    def _from_headers(self, records: Sequence[Record]) -> Iterator[list[int]]:
        texts = self.limit.count_texts([_texts(record) for record in records])
        for record, num_tokens in zip(records, texts, strict=True):
            try:
                images = [self.limit.count_image(self._size(name)) for name in _names(record)]
            except ValueError:
                # The processor rejects an image, which is reported with the row.
                yield self._by_processor(record)
                continue
            total = num_tokens + images[0]
            yield [total, images[0], images[1] if len(images) > 1 else -1]

    def _by_processor(self, record: Record) -> list[int]:
        rows = RowFormatter(images=self.images, processor=self.processor, image_aspect=self.aspect)
        row = rows.format_row(to_fields(record))
        (length,) = count_tokens([row], processor=self.processor)
        other = length.other_image
        return [length.total, length.image, -1 if other is None else other]

    def _size(self, name: str) -> tuple[int, int]:
        width, height = self.sizes[image_number(self.images.tables, name)].tolist()
        return width, height


def _texts(record: Record) -> TextRow:
    if isinstance(record, Pair):
        question, answers = record.question, [record.chosen, record.rejected]
    else:
        question, answers = record.text, list(record.references[:1])
    return TextRow(question=question, answers=answers, has_image=True, context=record.context)


def to_fields(record: Record) -> dict[str, Any]:
    """The record for `RowFormatter`, which formats a rejected image as the negative one."""
    fields = asdict(record)
    if isinstance(record, Pair) and record.rejected_image is not None:
        fields["negative"] = asdict(Negative(image=record.rejected_image))
    return fields
