"""The contact sheet: some of the pairs, with what the model saw, to look at before training."""

from collections import Counter
from collections.abc import Sequence

from tita.pairs.distort import distorted
from tita.pairs.noise import as_seen
from tita.pairs.work import Work
from tita.records import Pair
from tita.report import Comparison, Page, Side
from tita.vlm import VLM, open_image

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
