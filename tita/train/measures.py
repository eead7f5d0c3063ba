"""Lengths of rows and digests of images: from image headers, and remembered in the store.

The processor decides how many tokens an image has by the image's size alone, so one image of each
size is processed. Some rows are counted by the processor itself and compared.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch.distributed as dist
import transformers

from tita.data.dataset import image_cache
from tita.data.lengths import LengthLimit
from tita.errors import StoreUnavailable, TitaError
from tita.records import Pair, Question
from tita.storage import Store
from tita.storage.image_shards import image_version, read_image
from tita.storage.manifest import sha256_of
from tita.terminal import progress, say
from tita.train.checkpoints import retry_store
from tita.train.group import from_rank_0, gather
from tita.train.negatives import Negative
from tita.train.training_data import RowFormatter, RowLength, count_tokens
from tita.vlm.images import Aspect, open_image, read_size

Record = Pair | Question
_VERSION = "1"
"""Increased when the way of counting or the format of the remembered values changes."""
_NUM_SAMPLES = 16
"""Rows of each rank that the processor counts, too."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMeasures:
    """The length of each row, in order, and the SHA-256 of each image by its name."""

    lengths: Sequence[RowLength]
    digests: Mapping[str, str]


def measure_rows(
    records: Sequence[Record],
    *,
    images: Path,
    aspect: Aspect,
    model: str,
    processor: Any,
    store: Store,
) -> RowMeasures:
    """Measure all rows, or recall what an earlier start has measured; every rank calls this.

    Each rank measures its share, rows `rank`, `rank + world`, ...

    Args:
        records: pairs and questions with an image.
        images: the folder of their images.
        aspect: in which the model sees images.
        model: folder or hub name of the model of `processor`.
        store: remembers what was measured, at `cache/lengths/`.

    Raises:
        TitaError: an image is missing or unreadable, or the processor rejects it.
    """
    names = sorted({name for record in records for name in _names(record)})
    rank, world = dist.get_rank(), dist.get_world_size()
    key = ""

    def recall() -> tuple[Any, Any] | None:
        nonlocal key
        key = _key(records, names=names, images=images, aspect=aspect, model=model)
        return _read(store, key, num_rows=len(records), num_images=len(names))

    found = from_rank_0(recall)
    if found is None:
        own = records[rank::world]
        measurer = _Measurer(images=images, aspect=aspect, processor=processor, where=model)
        shares = gather(lambda: measurer.measure(own))
        table = np.empty((len(records), 3), dtype=np.int32)
        for number, (share, _) in enumerate(shares):
            table[number::world] = share
        digests = {name: digest for _, some in shares for name, digest in some.items()}
        packed = np.frombuffer(bytes.fromhex("".join(digests[n] for n in names)), dtype=np.uint8)
        found = table, packed.reshape(len(names), 32)
        if rank == 0:
            _write(store, key, *found)
    elif rank == 0:
        say("train-dpo: lengths and image digests read from the store")
    table, packed = found
    return RowMeasures(
        lengths=[
            RowLength(total=total, image=image, other_image=None if other < 0 else other)
            for total, image, other in table.tolist()
        ],
        digests={name: row.tobytes().hex() for name, row in zip(names, packed, strict=True)},
    )


def _names(record: Record) -> Iterable[str]:
    yield str(record.image)
    if isinstance(record, Pair) and record.rejected_image is not None:
        yield record.rejected_image


def _key(
    records: Sequence[Record], *, names: Sequence[str], images: Path, aspect: Aspect, model: str
) -> str:
    """The store key of what is measured: of the rows, the processor, and the files of the images.

    A file counts as unchanged with the same size and modification time. In the cache of a store in
    S3 all times are the same, but there the folder's name is the digest of its content, and images
    that rows store are named by their own digests.
    """
    facts = [_VERSION, transformers.__version__, aspect, str(images.absolute())]
    digest = hashlib.sha256(json.dumps([*facts, _processor_digest(model)]).encode())
    for record in records:
        digest.update(_text(record))
    for name in () if images == image_cache() else names:
        try:
            version = image_version(images / name)
        except OSError:
            continue  # reported when it is opened
        digest.update(f"{name}\n{version}\n".encode())
    return f"cache/lengths/{digest.hexdigest()}.npz"


def _text(record: Record) -> bytes:
    """What the length of a row depends on."""
    context = [(turn.role, turn.text, turn.num_images) for turn in record.context]
    own: tuple[str | None, ...]
    if isinstance(record, Pair):
        own = (record.question, record.chosen, record.rejected, record.rejected_image)
    else:
        own = (record.text, *record.references[:1])
    return json.dumps([record.image, own, context]).encode()


def _processor_digest(model: str) -> str:
    """Identifies a model's processor: its small files, or the name on the hub."""
    if not Path(model).is_dir():
        return model
    files = sorted(path for path in Path(model).rglob("*") if path.is_file())
    small = [path for path in files if path.suffix not in _WEIGHTS]
    listing = [f"{sha256_of(path)} {path.relative_to(model).as_posix()}\n" for path in small]
    return hashlib.sha256("".join(listing).encode()).hexdigest()


def _read(store: Store, key: str, *, num_rows: int, num_images: int) -> tuple[Any, Any] | None:
    if not store.exists(key):
        return None
    try:
        with np.load(io.BytesIO(store.get(key)), allow_pickle=False) as body:
            found = body["lengths"], body["digests"]
    except (ValueError, KeyError, OSError, EOFError, BadZipFile):
        found = None, None
    shapes = [getattr(part, "shape", None) for part in found]
    if shapes != [(num_rows, 3), (num_images, 32)]:
        raise TitaError(
            "not the lengths of these rows",
            where=f"{store.uri}/{key}",
            remedy="delete it; the next run measures them again",
        )
    return found


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

    images: Path
    aspect: Aspect
    processor: Any
    where: str
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def measure(self, records: Sequence[Record]) -> tuple[Any, dict[str, str]]:
        """Lengths `[N, 3]`: total, image and other image or -1; and the images' digests."""
        limit = LengthLimit(
            processor=self.processor, max_tokens=0, where=self.where, pad=self.aspect == "pad"
        )
        found = np.empty((len(records), 3), dtype=np.int32)
        with progress("checking the pairs", total=len(records), unit="pairs") as advance:
            for row, record in enumerate(records):
                found[row] = self._from_headers(record, limit=limit)
                advance()
        samples = set(range(0, len(records), max(1, len(records) // _NUM_SAMPLES)))
        if len(records):
            samples.add(int(found[:, 0].argmax()))
        if any(self._by_processor(records[row]) != found[row].tolist() for row in samples):
            say("train-dpo: the processor counts other tokens than image sizes tell; counting all")
            with progress("counting tokens", total=len(records), unit="pairs") as advance:
                for row, record in enumerate(records):
                    found[row] = self._by_processor(record)
                    advance()
        return found, self.digests

    def _from_headers(self, record: Record, *, limit: LengthLimit) -> list[int]:
        if isinstance(record, Pair):
            question, answers = record.question, [record.chosen, record.rejected]
        else:
            question, answers = record.text, list(record.references[:1])
        sizes = [self._open(name) for name in _names(record)]
        try:
            total = limit.count(question, answers, size=sizes[0], context=record.context)
            images = [limit.count_image(size) for size in sizes]
        except ValueError:
            # The processor rejects an image, which is reported with the row.
            return self._by_processor(record)
        return [total, images[0], images[1] if len(images) > 1 else -1]

    def _by_processor(self, record: Record) -> list[int]:
        rows = RowFormatter(images=self.images, processor=self.processor, image_aspect=self.aspect)
        row = rows.format_row(to_fields(record))
        (length,) = count_tokens([row], processor=self.processor)
        other = length.other_image
        return [length.total, length.image, -1 if other is None else other]

    def _open(self, name: str) -> tuple[int, int]:
        """Size of an image from its header; its file is hashed, and decoded if it may be cut."""
        if name not in self.sizes:
            path = self.images / name
            try:
                data = read_image(path)
            except OSError:
                open_image(path)
                raise
            self.sizes[name] = read_size(data, where=str(path))
            self.digests[name] = hashlib.sha256(data).hexdigest()
        return self.sizes[name]


def to_fields(record: Record) -> dict[str, Any]:
    """The record for `RowFormatter`, which formats a rejected image as the negative one."""
    fields = asdict(record)
    if isinstance(record, Pair) and record.rejected_image is not None:
        fields["negative"] = asdict(Negative(image=record.rejected_image))
    return fields
