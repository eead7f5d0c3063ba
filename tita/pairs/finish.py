"""From finished batches to the tree that training reads: pairs, lineage, a sheet to look at."""

import hashlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tita.data import write_pairs
from tita.errors import LostPeer, TitaError
from tita.pairs.build import Work, digest_of
from tita.pairs.distort import as_seen, distorted
from tita.provenance import software
from tita.records import Pair
from tita.report import Comparison, Page, Side
from tita.settings import settings
from tita.storage import Store
from tita.storage.manifest import sha256_of
from tita.terminal import progress, say
from tita.vlm import VLM, model_digest, open_image

_PACKAGES = ("torch", "transformers", "tokenizers", "pillow", "numpy")
_LONGEST_PAUSE_S = 15.0


def wait_for_others(work: Work, *, store: Store) -> None:
    """Wait until every batch is there, whoever does it.

    The workers of other pods share nothing but the store, so that is where worker 0 looks, less
    often the longer it waits.

    Raises:
        LostPeer: no batch has come for the recipe's `peer_timeout_s`.
    """
    missing = len(work.missing(store))
    if not missing:
        return
    since, pause_s = time.monotonic(), 0.5
    with progress("pairs, other workers", total=missing, unit="batches") as advance:
        while missing:
            waited_s = time.monotonic() - since
            if waited_s > work.recipe.peer_timeout_s:
                raise LostPeer(
                    f"{missing} of {work.num_batches} batches are missing and none has come for "
                    f"{waited_s:.0f} s",
                    where=f"{store.uri}/{work.parts}",
                    remedy="see why the other workers ended; started again, the run goes on here",
                )
            time.sleep(min(pause_s, work.recipe.peer_timeout_s))
            pause_s = min(1.5 * pause_s, _LONGEST_PAUSE_S)
            left = len(work.missing(store))
            if left < missing:
                advance(missing - left)
                missing, since = left, time.monotonic()


def finish(work: Work, *, run: str, base: VLM, store: Store) -> None:
    """Write the tree once all batches are there, then remove them; for worker 0 alone.

    Raises:
        TitaError: no pair was left.
    """
    batches = list(work.finished(store))
    pairs = [pair for batch in batches for pair in batch.pairs]
    dropped: Counter[str] = Counter()
    for batch in batches:
        dropped.update(batch.dropped)
    if not pairs:
        raise TitaError(
            f"no pairs: {dict(dropped)}",
            where=work.recipe.questions,
            remedy="distort more strongly, e.g. --set diffusion_steps=900",
        )
    lineage = _lineage(work, run=run, base=base, num_kept=len(pairs), dropped=dropped, store=store)
    with tempfile.TemporaryDirectory(prefix="tita-pairs-", dir=settings().scratch_dir) as scratch:
        folder = Path(scratch)
        (folder / "pairs.jsonl").write_bytes(write_pairs(pairs))
        (folder / "lineage.json").write_text(json.dumps(lineage, indent=2))
        sheet = contact_sheet(work, pairs, dropped=dropped, base=base)
        sheet.write(folder / "contact_sheet.html")
        store.push_tree(folder, work.out, meta=lineage)
    work.sweep(store)
    say(f"{len(pairs)} pairs in {work.out}; dropped: {dict(dropped) or 'none'}")


def _lineage(
    work: Work, *, run: str, base: VLM, num_kept: int, dropped: Counter[str], store: Store
) -> dict[str, Any]:
    """All that the pairs came of; what `is_done` and people compare runs by."""
    images = sorted({str(question.image) for question in work.questions})
    listing = "".join(f"{sha256_of(work.images / image)} {image}\n" for image in images)
    return {
        "job": "build-pairs",
        "run": run,
        **software(_PACKAGES),
        "recipe": work.recipe.model_dump(mode="json"),
        "seed": work.recipe.seed,
        "model": {"name": base.name, "digest": model_digest(base, store=store)},
        "questions_sha256": digest_of(work.questions),
        "images_sha256": hashlib.sha256(listing.encode()).hexdigest(),
        "num_questions": len(work.questions),
        "num_candidates": num_kept + dropped.total(),
        "num_kept": num_kept,
        "num_dropped": dict(dropped.most_common()),
    }


_SIZE = 48


def contact_sheet(work: Work, pairs: Sequence[Pair], *, dropped: Counter[str], base: VLM) -> Page:
    """A page of pairs that lie evenly among all, and of what became of the candidates."""
    page = Page("Preference pairs", subtitle=f"{work.out}, by {base.name}")
    counts = [("kept", len(pairs)), *dropped.most_common()]
    total = len(pairs) + dropped.total()
    page.table(
        [{"candidates": name, "number": n, "%": 100 * n / total} for name, n in counts],
        digits=1,
    )
    # Evenly, and never more than fit.
    number = min(_SIZE, len(pairs))
    shown = [pairs[place * len(pairs) // number] for place in range(number)]
    page.heading(f"{number} of {len(pairs)} pairs")
    page.text("Left the image as it is, right as it was distorted for the second answer.")
    page.comparisons([_comparison(work, pair, base=base) for pair in shown])
    return page


def _comparison(work: Work, pair: Pair, *, base: VLM) -> Comparison:
    question, _, name = pair.id.rpartition("/")
    clean = open_image(work.images / pair.image)
    other = distorted(
        clean,
        question=question,
        distortion=name,
        recipe=work.recipe,
        pad=base.image_aspect == "pad",
    )
    return Comparison(
        title=pair.question,
        note=f"{question} · {name}",
        sides=(
            Side(label="chosen", text=pair.chosen, image=clean, tone="good"),
            Side(
                label="rejected",
                text=pair.rejected,
                image=as_seen(other, base.processor),
                tone="bad",
            ),
        ),
    )
