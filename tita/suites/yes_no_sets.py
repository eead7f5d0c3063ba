"""Sets of yes/no questions: POPE over its three splits, and HallusionBench.

POPE: arXiv 2305.10355. HallusionBench: arXiv 2310.14566.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tita.bench.published_files import find_file, load_json
from tita.bench.questions import BenchmarkItem
from tita.bench.suites import read_pope
from tita.errors import TitaError
from tita.suites.paired_totals import Array, Totals
from tita.suites.scorers import (
    LENGTH,
    YES_RATIO,
    Figure,
    ScoredCounts,
    ScoredQuestion,
    Scorer,
    f1_of,
    ratio,
    yes_no_counts,
)

_SPLITS = ("random", "popular", "adversarial")


def read_pope_splits(source: Path, *, out: Path) -> Iterator[BenchmarkItem]:
    """POPE: all of `coco_pope_random.json`, `..._popular.json`, `..._adversarial.json`."""
    del out
    return read_pope(source)


def _pope_counts(question: ScoredQuestion) -> dict[str, float]:
    counts = yes_no_counts(question)
    names = ("yes/no", "score", "yes hits", "said yes", "labelled yes")
    return counts | {f"{question.category}: {name}": counts[name] for name in names}


def _split_f1(split: str) -> Figure:
    names = (f"{split}: {name}" for name in ("yes hits", "said yes", "labelled yes"))
    return Figure(value=f1_of(*names))


def _mean_over_splits(figures: Sequence[Figure]) -> Figure:
    """The mean over the splits that have questions."""

    def value(totals: Totals) -> Array:
        with np.errstate(invalid="ignore"):
            values = [figure.value(totals) for figure in figures]
        asked = [each for each in values if not np.isnan(each).all()]
        return np.mean(asked, axis=0) if asked else np.array(np.nan)

    return Figure(value=value)


POPE_SCORER = Scorer(
    load=lambda _: _pope_counts,
    # Six questions of every split are about one image.
    unit=lambda question: question.image,
    mean_of=[f"F1 {split}" for split in _SPLITS],
    figures={
        "F1 mean of splits": _mean_over_splits([_split_f1(split) for split in _SPLITS]),
        "accuracy mean of splits": _mean_over_splits(
            [Figure(value=ratio(f"{split}: score", f"{split}: yes/no")) for split in _SPLITS]
        ),
        **{f"F1 {split}": _split_f1(split) for split in _SPLITS},
        "precision": Figure(value=ratio("yes hits", "said yes")),
        "recall": Figure(value=ratio("yes hits", "labelled yes")),
        "yes ratio": YES_RATIO,
        "length in words": LENGTH,
    },
)


def read_hallusion(source: Path, *, out: Path) -> Iterator[BenchmarkItem]:
    """HallusionBench: `HallusionBench.json`, images in `<category>/<subcategory>/`.

    The id is category_subcategory_set_figure_question. A question with `visual_input` 0 has no
    image. The questions are as published, with a request for yes or no.

    Raises:
        TitaError: the file is missing, or a label is neither "0" nor "1".
    """
    del out
    path = find_file(source, "HallusionBench.json", "HallusionBench*.json")
    for entry in load_json(path):
        parts = [str(entry[key]) for key in ("set_id", "figure_id", "question_id")]
        category, subcategory = str(entry["category"]), str(entry["subcategory"])
        identity = "_".join([category, subcategory, *parts])
        if str(entry["gt_answer"]) not in ("0", "1"):
            raise TitaError(f"the label of {identity} is {entry['gt_answer']!r}", where=str(path))
        image = f"{category}/{subcategory}/{parts[0]}_{parts[1]}.png"
        yield BenchmarkItem(
            id=identity,
            text=f"{entry['question']}\nPlease answer yes or no.",
            images=(image,) if str(entry["visual_input"]) != "0" else (),
            references=("yes" if str(entry["gt_answer"]) == "1" else "no",),
            metric="yes-no",
            suite="hallusionbench",
            category=f"{category}+{subcategory}",
            group=f"{category}_{subcategory}_{parts[0]}",
        )


def _hallusion_counts(question: ScoredQuestion) -> dict[str, float]:
    """As published, an unclear answer is right where the figure that decides is not shown."""
    counts = yes_no_counts(question, _yes_or_no_word)
    if counts["unparsed"] and question.id.startswith("VS_") and _figure(question) == "0":
        return counts | {"score": 1.0}
    return counts


def _yes_or_no_word(answer: str) -> bool | None:
    """Yes or no if the answer has one of the two words; "it is not clear" is neither."""
    words = set(re.findall(r"[a-z]+", answer.lower()))
    return None if ("yes" in words) == ("no" in words) else "yes" in words


def _figure(question: ScoredQuestion) -> str:
    return question.id.rsplit("_", 2)[1]


def _hallusion_groups(
    questions: Sequence[ScoredCounts],
) -> dict[str, float]:
    """Figures and question pairs of one set of which every answer is right.

    As published, questions without a figure (figure 0 of VS) make no figure.
    """
    figures: dict[str, bool] = {}
    pairs: dict[str, bool] = {}
    for question, counts in questions:
        right = counts["score"] == 1
        _, figure, number = question.id.rsplit("_", 2)
        pairs[number] = pairs.get(number, True) and right
        if not (question.id.startswith("VS_") and figure == "0"):
            figures[figure] = figures.get(figure, True) and right
    return {
        "figures": float(len(figures)),
        "figures right": float(sum(figures.values())),
        "pairs": float(len(pairs)),
        "pairs right": float(sum(pairs.values())),
    }


HALLUSION_SCORER = Scorer(
    load=lambda _: _hallusion_counts,
    unit=lambda question: question.group,
    of_unit=_hallusion_groups,
    needs_whole_units=True,
    figures={
        "aAcc": Figure(value=ratio("score", "questions")),
        "fAcc": Figure(value=ratio("figures right", "figures")),
        "qAcc": Figure(value=ratio("pairs right", "pairs")),
        "yes ratio": YES_RATIO,
        "length in words": LENGTH,
    },
)
