"""From finished batches to the tree that training reads: pairs, lineage, a sheet to look at."""

import hashlib
import json
import tempfile
from collections import Counter
from pathlib import Path

from tita import __version__
from tita.data import write_pairs
from tita.errors import TitaError
from tita.pairs.build import Batch, Work
from tita.pairs.distort import DISTORTIONS, seed_of
from tita.records import Pair
from tita.report import Card, Page
from tita.storage import Store, is_done
from tita.storage.manifest import sha256_of
from tita.terminal import say
from tita.vlm import open_image

_SHEET_SIZE = 48


def finish(work: Work, *, out: str, run: str, model: dict[str, str], store: Store) -> bool:
    """Write the tree `out` if all batches are there, whoever did them; False if some are missing.

    Any number of workers may get here at once: they write the same bytes.

    Raises:
        TitaError: no pair was left, or `out` holds the pairs of another recipe.
    """
    keys = [work.key(number) for number in range(work.num_batches)]
    if is_done(out, recipe=work.recipe.model_dump(mode="json"), store=store):
        return True
    if not all(store.exists(key) for key in keys):
        return False
    batches = [Batch.from_json(store.get(key)) for key in keys]
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
    lineage = _lineage(work, run=run, model=model, num_kept=len(pairs), dropped=dropped)
    with tempfile.TemporaryDirectory(prefix="tita-pairs-") as scratch:
        folder = Path(scratch)
        (folder / "pairs.jsonl").write_bytes(write_pairs(pairs))
        (folder / "lineage.json").write_text(json.dumps(lineage, indent=2))
        _contact_sheet(work, pairs, dropped=dropped).write(folder / "contact_sheet.html")
        store.push_tree(folder, out, meta=lineage)
    for key in keys:
        store.delete(key)
    say(f"{len(pairs)} pairs in {out}; dropped: {dict(dropped) or 'none'}")
    return True


def _lineage(
    work: Work, *, run: str, model: dict[str, str], num_kept: int, dropped: Counter[str]
) -> dict[str, object]:
    texts = json.dumps([(q.id, q.text, q.image, q.references) for q in work.questions])
    images = sorted({str(question.image) for question in work.questions})
    listing = "".join(f"{sha256_of(work.images / image)} {image}\n" for image in images)
    return {
        "job": "build-pairs",
        "run": run,
        "tita": __version__,
        "recipe": work.recipe.model_dump(mode="json"),
        "model": model,
        "questions_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        "images_sha256": hashlib.sha256(listing.encode()).hexdigest(),
        "num_questions": len(work.questions),
        "num_kept": num_kept,
        "num_dropped": dict(dropped),
    }


def _contact_sheet(work: Work, pairs: list[Pair], *, dropped: Counter[str]) -> Page:
    page = Page(
        "Preference pairs",
        subtitle=f"{len(pairs)} kept; dropped: "
        + (", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"),
    )
    page.text(
        f"Every {max(1, len(pairs) // _SHEET_SIZE)}th pair; clean image left, distorted right."
    )
    chosen = pairs[:: max(1, len(pairs) // _SHEET_SIZE)][:_SHEET_SIZE]
    page.gallery([_card(work, pair) for pair in chosen])
    return page


def _card(work: Work, pair: Pair) -> Card:
    import PIL.Image

    question, _, name = pair.id.rpartition("/")
    clean = open_image(work.images / pair.image)
    distorted = DISTORTIONS[name](
        clean,
        step=work.recipe.diffusion_steps,
        seed=seed_of(question, distortion=name, seed=work.recipe.seed),
    )
    both = PIL.Image.new("RGB", (2 * clean.width, clean.height))
    both.paste(clean, (0, 0))
    both.paste(distorted, (clean.width, 0))
    return Card(
        title=pair.question,
        image=both,
        lines=[("chosen", pair.chosen), ("rejected", pair.rejected)],
    )
