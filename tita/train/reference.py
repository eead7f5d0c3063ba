"""Reference log-probabilities: computed once for a model and its pairs, and cached in the store.

While they are computed, those that are new are stored every two minutes as
`cache/reference/<digest>/<first>-<end>.npz`, and a restarted run continues behind them. At the end
one object, `cache/reference/<digest>.npz`, replaces these.
"""

import hashlib
import io
import json
import re
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch.distributed as dist

from tita.data.digest_set import distinct
from tita.errors import StoreUnavailable, TitaError
from tita.records import Pair
from tita.storage import Store
from tita.terminal import say
from tita.train.checkpoints import retry_store
from tita.train.group import from_rank_0, on_all_ranks, share_from_rank_0
from tita.train.negatives import Negative
from tita.train.training_data import TrainInputs, start_model_digest

LogProbs = Sequence[Any]
"""Arrays `[N]` of float32 in the order of the pairs: of the chosen and the rejected answers; then
of the chosen, and of the rejected answers under the pairs' other images, as far as they are
used."""

AddBatch = Callable[[Sequence[Sequence[float]]], None]
"""Called on every rank with the log-probabilities of the next pairs, by answer and image."""
Compute = Callable[[int, AddBatch], None]
"""Computes, on every rank, those of all pairs from the given number on, in order."""

STORE_EVERY_S = 120.0
_SHARD = re.compile(r"(\d+)-(\d+)\.npz")
_KEYS = ("chosen", "rejected", "other_chosen", "other_rejected")
_REFERENCE_VERSION = "3"
"""Increased when the prompt format or the format of the cached values changes."""


def reference_key(
    start: TrainInputs,
    *,
    pairs: Sequence[Pair],
    negatives: Sequence[Negative],
    dtype: str,
    ld_alpha: float | None = None,
    quantization: str | None = None,
    held_out: bool = False,
) -> str:
    """The store key of the reference log-probabilities of these pairs under this model."""
    facts = [_REFERENCE_VERSION, start_model_digest(start.model), start.image_aspect, dtype]
    if ld_alpha is not None:
        facts.append(f"ld_alpha {ld_alpha}")
    if quantization is not None:
        facts.append(f"quantization {quantization}")
    if held_out:
        facts.append("held out")
    digest = hashlib.sha256(json.dumps(facts).encode())
    for pair in pairs:
        # Without `rejected_image`, which matters only as a negative.
        digest.update(json.dumps(astuple(pair)[:-1]).encode())
    for name in distinct(pair.image for pair in pairs):
        digest.update(start.image_digests[name].encode())
    for negative in negatives:
        other = [negative.change, negative.seed, start.image_digests[negative.image]]
        digest.update(json.dumps(other).encode())
    return f"cache/reference/{digest.hexdigest()}.npz"


def recall_reference(
    compute: Compute,
    *,
    key: Callable[[], str],
    store: Store,
    num_pairs: int,
    num_parts: int = 2,
) -> LogProbs:
    """The log-probabilities cached at `key()`; computes and caches those that are not.

    Every rank calls this. Only rank 0 computes the key, which reads all weights, and accesses the
    store.

    Args:
        compute: computes those that are missing.
        key: of the store.
        store: that caches them.
        num_pairs: number of pairs.
        num_parts: number of answers and images of each pair, from 2 to 4.
    """
    where = ""
    known = [array("f") for _ in range(num_parts)]

    def read() -> int:
        nonlocal where, known
        where = key()
        if not store.exists(where):
            known = _read_shards(store, where, num_parts=num_parts)
            return len(known[0])
        found = _parse(store.get(where), num_parts=num_parts)
        if found is None or len(found[0]) != num_pairs:
            raise _damaged(store, where)
        say("train-dpo: reference log-probabilities read from the store")
        known = found
        return num_pairs

    num_known = from_rank_0(read)
    for part in known:
        if dist.get_rank() != 0:
            part.frombytes(bytes(part.itemsize * num_known))
        with memoryview(part) as values:
            share_from_rank_0(np.frombuffer(values, dtype=np.float32))
    if num_known == num_pairs:
        is_complete = from_rank_0(lambda: store.exists(where))
    else:
        _compute_rest(compute, known, store=store, where=where, num_pairs=num_pairs)
        is_complete = False

    def write() -> None:
        if not is_complete and dist.get_rank() == 0:
            retry_store(lambda: store.put(where, _to_bytes(known)))
            retry_store(lambda: store.delete_tree(where.removesuffix(".npz")))

    on_all_ranks(write)
    return [np.frombuffer(part, dtype=np.float32) for part in known]


def _compute_rest(
    compute: Compute, known: "list[array[float]]", *, store: Store, where: str, num_pairs: int
) -> None:
    """Compute what is missing behind `known`, append it, and store it now and then."""
    first = num_stored = len(known[0])
    stored_at = time.monotonic()
    on_rank_0 = dist.get_rank() == 0
    if first and on_rank_0:
        say(f"train-dpo: reference pass continues at pair {first:,} of {num_pairs:,}")

    def add(batch: Sequence[Sequence[float]]) -> None:
        nonlocal num_stored, stored_at
        for part, values in zip(known, batch, strict=True):
            part.extend(values)
        if not on_rank_0 or time.monotonic() - stored_at < STORE_EVERY_S:
            return
        shard = f"{where.removesuffix('.npz')}/{num_stored:09}-{len(known[0]):09}.npz"
        try:
            store.put(shard, _to_bytes([part[num_stored:] for part in known]))
            num_stored = len(known[0])
        except (StoreUnavailable, OSError) as error:
            say(f"train-dpo: cannot store a part of the reference pass, will retry: {error}")
        stored_at = time.monotonic()

    compute(first, add)
    if len(known[0]) != num_pairs:
        raise RuntimeError(f"{len(known[0])} of {num_pairs} reference log-probabilities")


def _read_shards(store: Store, where: str, *, num_parts: int) -> "list[array[float]]":
    """What an interrupted pass has stored, up to the first gap."""
    folder = f"{where.removesuffix('.npz')}/"
    known = [array("f") for _ in range(num_parts)]
    for info in store.list(folder):
        span = _SHARD.fullmatch(info.key.removeprefix(folder))
        # A pass that continued with fewer shards, or two passes at once, may leave others.
        if span is None or not int(span[1]) <= len(known[0]) < int(span[2]):
            continue
        found = _parse(store.get(info.key), num_parts=num_parts)
        if found is None or len(found[0]) != int(span[2]) - int(span[1]):
            raise _damaged(store, info.key)
        for part, values in zip(known, found, strict=True):
            part.extend(values[len(part) - int(span[1]) :])
    return known


def _to_bytes(parts: "Sequence[array[float]]") -> bytes:
    body = io.BytesIO()
    arrays: dict[str, Any] = {
        name: np.frombuffer(part, dtype=np.float32)
        for name, part in zip(_KEYS, parts, strict=False)
    }
    np.savez(body, **arrays)
    return body.getvalue()


def _parse(data: bytes, *, num_parts: int) -> "list[array[float]] | None":
    """The values by answer and image, as many of each; None if they are not those."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as body:
            found = [array("f", body[name].tobytes()) for name in _KEYS[:num_parts]]
    except (ValueError, KeyError, OSError, EOFError, BadZipFile):
        return None
    return found if len({len(part) for part in found}) == 1 else None


def _damaged(store: Store, key: str) -> TitaError:
    return TitaError(
        "not the log-probabilities of these pairs",
        where=f"{store.uri}/{key}",
        remedy="delete it; the next run computes them again",
    )
