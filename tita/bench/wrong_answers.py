"""The gallery of wrong answers: image, question, answer and references, and how they came about."""

from collections.abc import Sequence

import numpy as np

from tita.bench.columns import BenchmarkRun, answer_of
from tita.bench.page_images import ImageFolder
from tita.report import Card, Page

_MAX_PER_RUN = 12
_MAX_RUNS = 6


def add_wrong_answers(page: Page, runs: Sequence[BenchmarkRun], *, images: ImageFolder) -> None:
    """Add the first wrong answers of each run, with its endpoint and command."""
    shown = 0
    for run in runs:
        cards, num_wrong = wrong_answer_cards(run, images=images)
        if not cards:
            continue
        if not shown:
            page.heading("Wrong answers")
        shown += 1
        if shown > _MAX_RUNS:
            page.text(f"Only the first {_MAX_RUNS} runs are shown.")
            return
        page.heading(run.title, level=3)
        for known in list(run.conditions.values())[:1]:
            page.text(f"Endpoint {known['endpoint']}; command: {known['command']}")
        page.text(f"{num_wrong} answers have a score of 0; {len(cards)} are shown.")
        page.gallery(cards)


def wrong_answer_cards(run: BenchmarkRun, *, images: ImageFolder) -> tuple[list[Card], int]:
    """Cards of the first answers with a score of 0, and the number of all of them."""
    identities = list(run.rows)
    wrong = [identities[row] for row in np.flatnonzero(run.column("score") == 0)]
    cards = [
        Card(
            title=f"{record['question_id']}: {record['prompt']}",
            image=images.first_of(record),
            lines=[
                ("answer", answer_of(record)[:400] or "(no text)"),
                (
                    "reference",
                    ", ".join(dict.fromkeys(map(str, record.get("references") or ())))[:200],
                ),
            ],
            flag="wrong",
            tone="bad",
        )
        for record in run.read(wrong[:_MAX_PER_RUN])
    ]
    return cards, len(wrong)
