"""Reference log-probabilities, remembered in the store by what they depend on."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path

from tita.errors import TitaError
from tita.records import Pair
from tita.storage import Store
from tita.storage.manifest import sha256_of
from tita.terminal import say
from tita.train.checkpoints import patiently
from tita.train.dataset import start_digest
from tita.train.group import gathered
from tita.train.trainer import LogProbs

_FORM = "1"
"""Counts up when prompts are formed otherwise or numbers are kept otherwise."""


def reference_key(
    pairs: Sequence[Pair], *, model: str, images: Path, image_aspect: str, dtype: str
) -> str:
    """Where in the store the log-probabilities of these pairs under this model lie."""
    digest = hashlib.sha256()
    digest.update(json.dumps([_FORM, start_digest(model), image_aspect, dtype]).encode())
    for pair in pairs:
        digest.update(json.dumps(astuple(pair)).encode())
    for name in sorted({pair.image for pair in pairs}):
        digest.update(sha256_of(images / name).encode())
    return f"cache/reference/{digest.hexdigest()}.json"


def recall(
    compute: Callable[[], LogProbs], *, key: Callable[[], str], store: Store, number: int
) -> LogProbs:
    """The log-probabilities that the store has at `key()`, else newly computed ones.

    Every rank of the gang calls this; rank 0 alone finds the key, which means reading every image
    and weight, and speaks with the store.
    """
    import torch.distributed as dist

    where = ""

    def look() -> LogProbs | None:
        nonlocal where
        if dist.get_rank() != 0:
            return None
        where = key()
        return _read(where, store=store, number=number)

    found = gathered(look)[0]
    if found is not None:
        return found
    computed = compute()
    if dist.get_rank() == 0:
        body = json.dumps({"chosen": computed[0], "rejected": computed[1]})
        patiently(lambda: store.put(where, body.encode()))
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
