"""Sets whose open answers a judge model scores: MMHal-Bench, MM-Vet v2, LLaVA-Bench.

MMHal-Bench: arXiv 2309.14525. MM-Vet v2: arXiv 2408.00765. LLaVA-Bench: arXiv 2304.08485.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tita.bench.judge import MM_VET_V2, MMHAL, write_judge_prompt
from tita.bench.published_files import find_file, load_json, read_utf8
from tita.bench.questions import BenchmarkItem
from tita.errors import TitaError
from tita.suites.scorers import LENGTH, Figure, ScoredQuestion, Scorer, ratio

MMHAL_RATINGS = 6
"""The best rating of MMHal-Bench; below 3 an answer has a hallucination."""
_IMAGE_END = (".jpg", ".jpeg", ".png")


def read_mmhal(source: Path, *, out: Path) -> Iterator[BenchmarkItem]:
    """MMHal-Bench: `response_template.json`, `eval_gpt4.py`, images by the names of their URLs.

    The judge's prompt is the text `template` in the published `eval_gpt4.py`. References are the
    human's answer and the objects in the image.

    Raises:
        TitaError: a file is missing, or the script has no such text.
    """
    path = find_file(source, "response_template.json", "mmhal-bench*.json")
    script = find_file(source, "eval_gpt4.py", "eval*mmhal*.py")
    write_judge_prompt(out, _template(script))
    for number, entry in enumerate(load_json(path)):
        yield BenchmarkItem(
            id=str(number),
            text=entry["question"],
            images=(str(entry["image_src"]).rpartition("/")[2],),
            references=(entry["gt_answer"], ", ".join(entry["image_content"])),
            metric=MMHAL,
            suite="mmhal-bench",
            category=entry["question_type"],
        )


def _template(script: Path) -> str:
    """The text that a Python file assigns to `template`."""
    try:
        tree = ast.parse(read_utf8(script))
    except SyntaxError as error:
        raise TitaError(f"not Python ({error.msg})", where=str(script)) from None
    for node in ast.walk(tree):
        names = [getattr(target, "id", "") for target in getattr(node, "targets", ())]
        value = getattr(node, "value", None)
        if "template" in names and isinstance(value, ast.Constant):
            text = str(value.value)
            if text.count("{}") == 4:
                return text
    raise TitaError(
        "the file has no text `template` with four places",
        where=str(script),
        remedy="give MMHal-Bench's own eval_gpt4.py",
    )


def _mmhal_counts(question: ScoredQuestion) -> dict[str, float] | None:
    if question.review is None:
        return None
    rating = round(question.review[0] * MMHAL_RATINGS)
    return {
        "score": question.review[0],
        "rating": float(rating),
        "made up": float(rating < 3),
        f"{question.category}: rating": float(rating),
        f"{question.category}: questions": 1.0,
    }


_MMHAL_KINDS = (
    "attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic",
    "other",
)  # fmt: skip
MMHAL_SCORER = Scorer(
    load=lambda _: _mmhal_counts,
    figures={
        "rating 0 to 6": Figure(value=ratio("rating", "questions", factor=1.0)),
        "hallucination rate": Figure(value=ratio("made up", "questions"), better=-1),
        **{
            f"rating {kind}": Figure(
                value=ratio(f"{kind}: rating", f"{kind}: questions", factor=1.0)
            )
            for kind in _MMHAL_KINDS
        },
        "length in words": LENGTH,
    },
)


def read_mm_vet_v2(source: Path, *, out: Path) -> Iterator[BenchmarkItem]:
    """MM-Vet v2: `mm-vet-v2.json`, images in `images/`.

    A question is text and images in turn, separated by `<IMG>`; the images are sent where they
    stand. The category names the capabilities.

    Raises:
        TitaError: the file is missing.
    """
    del out
    for identity, entry in load_json(find_file(source, "mm-vet-v2.json")).items():
        parts = [part.strip() for part in str(entry["question"]).split("<IMG>")]
        images = tuple(part for part in parts if part.endswith(_IMAGE_END))
        text = "\n".join("<image>" if part in images else part for part in parts if part)
        yield BenchmarkItem(
            id=identity,
            text=re.sub(r"\s*<image>\s*", "\n", text).strip() if len(images) == 1 else text,
            images=images,
            references=(entry["answer"],),
            metric=MM_VET_V2,
            suite="mm-vet-v2",
            category="+".join(sorted(entry["capability"])),
        )


_CAPABILITIES = ("gen", "know", "math", "ocr", "rec", "seq", "spat")


def _mm_vet_counts(question: ScoredQuestion) -> dict[str, float] | None:
    if question.review is None:
        return None
    counts = {"score": question.review[0]}
    for capability in question.category.split("+"):
        counts |= {f"{capability}: score": question.review[0], f"{capability}: questions": 1.0}
    return counts


MM_VET_V2_SCORER = Scorer(
    load=lambda _: _mm_vet_counts,
    figures={
        "total": Figure(value=ratio("score", "questions")),
        **{
            name: Figure(value=ratio(f"{name}: score", f"{name}: questions"))
            for name in _CAPABILITIES
        },
        "length in words": LENGTH,
    },
)


def _llava_counts(question: ScoredQuestion) -> dict[str, float] | None:
    if question.review is None:
        return None
    return {"score": question.review[0], "reference score": question.review[1]}


LLAVA_BENCH_SCORER = Scorer(
    load=lambda _: _llava_counts,
    figures={
        # As of the paper: the sum of the answers' scores over that of the references'.
        "relative score": Figure(value=ratio("score", "reference score")),
        "length in words": LENGTH,
    },
)
