"""Reference log-probabilities: computed once for a model and its pairs, and cached in the store."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import astuple

import torch.distributed as dist

from tita.errors import TitaError
from tita.records import Pair
from tita.storage import Store
from tita.terminal import say
from tita.train.checkpoints import retry_store
from tita.train.group import from_rank_0
from tita.train.negatives import Negative
from tita.train.training_data import TrainInputs, start_model_digest

LogProbs = Sequence[Sequence[float]]
"""Of the chosen and of the rejected answers, in the order of the pairs; then those of the chosen,
and of the rejected answers under the pairs' other images, as far as they are used."""

_KEYS = ("chosen", "rejected", "other_chosen", "other_rejected")
_REFERENCE_VERSION = "2"
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
    for name in sorted({pair.image for pair in pairs}):
        digest.update(start.image_digests[name].encode())
    for negative in negatives:
        other = [negative.change, negative.seed, start.image_digests[negative.image]]
        digest.update(json.dumps(other).encode())
    return f"cache/reference/{digest.hexdigest()}.json"


def recall_reference(
    compute: Callable[[], LogProbs],
    *,
    key: Callable[[], str],
    store: Store,
    num_pairs: int,
    num_parts: int = 2,
) -> LogProbs:
    """The log-probabilities cached at `key()`; without any, computes and caches them.

    Every rank calls this. Only rank 0 computes the key, which reads all weights, and accesses the
    store.

    Args:
        compute: computes them on every rank.
        key: of the store.
        store: that caches them.
        num_pairs: number of pairs.
        num_parts: number of answers and images of each pair, from 2 to 4.
    """
    where = ""

    def read() -> LogProbs | None:
        nonlocal where
        where = key()
        if not store.exists(where):
            return None
        try:
            body = json.loads(store.get(where))
            found = [body[name] for name in _KEYS[:num_parts]]
        except (ValueError, KeyError, TypeError):
            found = [[]]
        if any(len(some) != num_pairs for some in found):
            raise TitaError(
                "not the log-probabilities of these pairs",
                where=f"{store.uri}/{where}",
                remedy="delete it; the next run computes them again",
            )
        say("train-dpo: reference log-probabilities read from the store")
        return found

    found = from_rank_0(read)
    if found is None:
        found = compute()
        if dist.get_rank() == 0:
            body = json.dumps(dict(zip(_KEYS, found, strict=False)))
            retry_store(lambda: store.put(where, body.encode()))
    return found
