"""Reference log-probabilities, remembered in the store by what they depend on."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path

from tita.errors import TitaError
from tita.records import Pair
from tita.storage import Store
from tita.storage.manifest import describe, sha256_of
from tita.terminal import say
from tita.train.trainer import LogProbs

_FORM = "1"
"""Counts up when prompts are formed otherwise or numbers are kept otherwise."""


def reference_key(
    pairs: Sequence[Pair], *, model: str, images: Path, image_aspect: str, dtype: str
) -> str:
    """Where in the store the log-probabilities of these pairs under this model lie."""
    digest = hashlib.sha256()
    # A model's folder holds the chat template and the image processor too: the prompt format.
    start = describe(Path(model)).digest if Path(model).is_dir() else model
    digest.update(json.dumps([_FORM, start, image_aspect, dtype]).encode())
    for pair in pairs:
        digest.update(json.dumps(astuple(pair)).encode())
    for name in sorted({pair.image for pair in pairs}):
        digest.update(sha256_of(images / name).encode())
    return f"cache/reference/{digest.hexdigest()}.json"


def recall(compute: Callable[[], LogProbs], *, key: str, store: Store, number: int) -> LogProbs:
    """The log-probabilities that the store has at `key`, else newly computed ones.

    Every rank of the gang calls this; rank 0 alone speaks with the store.
    """
    import torch.distributed as dist

    found: list[LogProbs | None] = [None]
    if dist.get_rank() == 0:
        found[0] = _read(key, store=store, number=number)
    dist.broadcast_object_list(found, src=0)
    if found[0] is not None:
        return found[0]
    computed = compute()
    if dist.get_rank() == 0:
        body = json.dumps({"chosen": computed[0], "rejected": computed[1]})
        store.put(key, body.encode())
    return computed


def _read(key: str, *, store: Store, number: int) -> LogProbs | None:
    if not store.exists(key):
        return None
    try:
        body = json.loads(store.get(key))
        chosen, rejected = body["chosen"], body["rejected"]
    except (ValueError, KeyError, TypeError):
        chosen = rejected = []
    if not len(chosen) == len(rejected) == number:
        raise TitaError(
            "not the log-probabilities of these pairs",
            where=f"{store.uri}/{key}",
            remedy="delete it; they are computed again",
        )
    say("train-dpo: reference log-probabilities from the store")
    return chosen, rejected
