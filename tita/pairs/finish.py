"""Writes the tree of a finished run: pairs, lineage, and a contact sheet for inspection."""

import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tita.activity import mark_progress
from tita.data import write_pairs
from tita.data.digest_set import DigestSet
from tita.data.image_table import open_picture
from tita.data.shortcuts import measure_shortcuts
from tita.errors import LostPeer, TitaError
from tita.json_text import dump_json
from tita.pairs.build import PairBatch, PairsRun, hash_questions
from tita.pairs.distort import distort, render_noise
from tita.pairs.taught import PLAIN
from tita.provenance import software
from tita.records import Pair
from tita.report import Page, Panel, SideBySide
from tita.settings import settings
from tita.storage import Store
from tita.terminal import progress, say
from tita.vlm.loading import VLM

_PACKAGES = ("torch", "transformers", "tokenizers", "pillow", "numpy")
_MAX_PAUSE_S = 15.0
_MAX_SHEET_PAIRS = 48
_MORE_PAIRS = {
    "distort": "distort more strongly, e.g. --set diffusion_steps=900",
    "judge": "sample more answers, or more different ones: --set samples=8 --set temperature=1",
    "contrast": "let contrast change more answers, e.g. --set contrast.weight=2",
    "teacher": "check that the teacher answers, and other than the base",
}
"""What to do if no pairs are left, by strategy."""


def wait_for_batches(run: PairsRun, *, store: Store) -> None:
    """Wait until all batches are in the store, whichever workers build them.

    Workers of different pods share only the store; worker 0 polls it with growing pauses.

    Raises:
        LostPeer: no batch was finished for the recipe's `peer_timeout_s` per step of a batch.
    """
    missing = run.missing_batches(store)
    if not missing:
        return
    since, pause_s = time.monotonic(), 0.5
    timeout_s = run.recipe.peer_timeout_s * run.steps_per_batch
    with progress("waiting for other workers", total=len(missing), unit="batches") as advance:
        while missing:
            waited_s = time.monotonic() - since
            if waited_s > timeout_s:
                raise LostPeer(
                    f"{len(missing)} of {run.num_batches} batches are missing and none was "
                    f"finished for {waited_s:.0f} s",
                    where=f"{store.uri}/{run.parts}",
                    remedy="check why the other workers ended; a restart continues the run",
                )
            # This wait has its own bound.
            mark_progress()
            time.sleep(min(pause_s, run.recipe.peer_timeout_s))
            pause_s = min(1.5 * pause_s, _MAX_PAUSE_S)
            left = run.missing_batches(store, among=missing)
            if len(left) < len(missing):
                advance(len(missing) - len(left))
                missing, since = left, time.monotonic()


def write_tree(run: PairsRun, *, name: str, base: VLM, store: Store) -> None:
    """Write the tree from all batches, then delete them; only worker 0 calls this.

    Raises:
        TitaError: no pairs are left, or batches were built with other models or images.
    """
    number = run.num_batches
    images, known, outdated = hashlib.sha256(), DigestSet(), list[int]()
    told = run.endpoint
    with progress("reading the batches", total=number, unit="batches") as advance:

        def checked() -> Iterator[PairBatch]:
            nonlocal told
            for index, batch in enumerate(run.read_batches(store)):
                digests = run.image_digests(index)
                # Worker 0 may have asked nothing: all batches are compared with the first.
                told = told or batch.endpoint
                if run.is_outdated(batch, digests) or (batch.endpoint and batch.endpoint != told):
                    outdated.append(index)
                for name, sha256 in digests.items():
                    if known.add(name):
                        images.update(f"{sha256} {name}\n".encode())
                advance()
                yield batch

        whole = PairBatch.join(checked())
    if outdated:
        # Workers check their own batches when they start; these files changed later, or differ.
        raise TitaError(
            f"{len(outdated)} of {number} batches were built with other models or images",
            where=f"{store.uri}/{run.parts}",
            remedy="make these files the same on all nodes and start again: only they are rebuilt",
        )
    pairs, dropped, cost = whole.pairs, Counter(whole.dropped), Counter(whole.cost)
    if not pairs:
        raise TitaError(
            f"no pairs: {dict(dropped)}",
            where=run.recipe.questions,
            remedy=_MORE_PAIRS[run.recipe.strategy],
        )
    shortcuts = measure_shortcuts(pairs)
    lineage: dict[str, Any] = {
        "job": "build-pairs",
        "run": name,
        **software(_PACKAGES),
        "recipe": run.recipe.model_dump(mode="json"),
        "seed": run.recipe.seed,
        "model": {"name": base.name, "digest": run.models["base"]},
        "rewards": {
            name: {"name": where, "digest": run.models[name]}
            for name, where in run.recipe.contrast.rewards.items()
        },
        **_judges(run, told=told, served_by=whole.served_by),
        "questions_sha256": hash_questions(run.questions),
        "images_sha256": images.hexdigest(),
        "num_questions": len(run.questions),
        "num_candidates": len(pairs) + dropped.total(),
        "num_kept": len(pairs),
        "num_dropped": dict(dropped.most_common()),
        "shortcuts": shortcuts and shortcuts.as_json(),
        f"{run.recipe.strategy}_cost": dict(cost) or None,
    }
    with tempfile.TemporaryDirectory(prefix="tita-pairs-", dir=settings().scratch_dir) as scratch:
        folder = Path(scratch)
        (folder / "pairs.jsonl").write_bytes(write_pairs(pairs))
        (folder / "lineage.json").write_text(dump_json(lineage, indent=2))
        sheet = contact_sheet(run, pairs, dropped=dropped, base=base)
        sheet.write(folder / "contact_sheet.html")
        store.push_tree(folder, run.out, meta=lineage)
    run.delete_batches(store)
    say(f"{len(pairs)} pairs in {run.out}; dropped: {dict(dropped) or 'none'}")
    if cost:
        say(
            f"{run.recipe.strategy}: {cost['requests']:,} requests, "
            f"{cost['prompt_tokens']:,} tokens in, {cost['completion_tokens']:,} out"
        )
    if len(whole.served_by) > 1:
        say(f"{run.recipe.strategy}: several models answered: {', '.join(whole.served_by)}")
    if shortcuts is not None:
        shortcuts.report()


def _judges(run: PairsRun, *, told: Mapping[str, Any], served_by: Sequence[str]) -> dict[str, Any]:
    """The models that judge or teach, with their digests, or what their endpoint tells of them."""
    recipe, models = run.recipe, run.models
    found: dict[str, Any] = {}
    if recipe.reward is not None:
        names = {"trained": recipe.reward.model, "reference": recipe.reward.reference}
        found["ranker"] = {
            role: {"name": name, "digest": models["reward" if role == "trained" else role]}
            for role, name in names.items()
        }
    if recipe.teacher.model is not None:
        found["teacher"] = {"name": recipe.teacher.model, "digest": models["teacher"]}
    asked = recipe.endpoint or recipe.teacher.endpoint
    if asked is not None:
        found["endpoint"] = {"name": asked.model, **told, "served_by": list(served_by)}
    return found


def contact_sheet(
    run: PairsRun, pairs: Sequence[Pair], *, dropped: Counter[str], base: VLM
) -> Page:
    """Return a page with evenly spaced pairs, and the number of candidates kept and dropped."""
    page = Page("Preference pairs", subtitle=f"{run.out}, by {base.name}")
    counts = [("kept", len(pairs)), *dropped.most_common()]
    total = len(pairs) + dropped.total()
    page.table(
        [{"candidates": name, "number": n, "%": 100 * n / total} for name, n in counts],
        digits=1,
    )
    number = min(_MAX_SHEET_PAIRS, len(pairs))
    shown = [pairs[index * len(pairs) // number] for index in range(number)]
    page.heading(f"{number} of {len(pairs)} pairs")
    if run.recipe.strategy != "judge":
        page.text("Left: the image as it is. Right: distorted, as for the rejected answer.")
    page.side_by_side([_compare_images(run, pair, base=base) for pair in shown])
    return page


def _compare_images(run: PairsRun, pair: Pair, *, base: VLM) -> SideBySide:
    question_id, _, distortion = pair.id.rpartition("/")
    clean = open_picture(run.images, pair.image)
    if run.recipe.strategy == "judge":
        panels = (
            Panel(label="best", text=pair.chosen, image=clean, tone="good"),
            Panel(label="worst", text=pair.rejected, image=clean, tone="bad"),
        )
        return SideBySide(title=pair.question, note=question_id, panels=panels)
    kind = distortion.partition("-")[0]
    if kind == PLAIN:
        taught = "teacher" if run.recipe.strategy == "teacher" else "with contrast"
        panels = (
            Panel(label=taught, text=pair.chosen, image=clean, tone="good"),
            Panel(label="plain", text=pair.rejected, image=clean, tone="bad"),
        )
        return SideBySide(title=pair.question, note=question_id, panels=panels)
    distorted = distort(
        clean,
        question_id=question_id,
        distortion=kind,
        recipe=run.recipe,
        pad=base.image_aspect == "pad",
    )
    return SideBySide(
        title=pair.question,
        note=f"{question_id} · {kind}",
        panels=(
            Panel(label="chosen", text=pair.chosen, image=clean, tone="good"),
            Panel(
                label="rejected",
                text=pair.rejected,
                image=render_noise(distorted, base.processor),
                tone="bad",
            ),
        ),
    )
