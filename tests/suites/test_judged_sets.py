"""MMHal-Bench, MM-Vet v2 and LLaVA-Bench: the judge's prompt, its reviews, and the figures."""

import json
import random
from pathlib import Path

import pytest

from tests.suites.published import answered, figures, read
from tita.bench.judge import (
    LLAVA_BENCH,
    MM_VET_V2,
    MMHAL,
    judge_items,
    judge_prompt,
    parse_review,
)
from tita.errors import TitaError

TEMPLATE = "Judge this.\n### Image Contents\n{}\n### Question\n{}\n### Answer\n{}\n### Response\n{}"
MMHAL_FILES = {
    "response_template.json": [
        {
            "question_type": kind, "question_topic": "outdoor", "image_id": "x",
            "image_src": f"https://host.example/7/{kind}_o.jpg", "image_content": ["Door", "Man"],
            "question": f"What {kind}?", "gt_answer": "A door.", "model_answer": "",
        }
        for kind in ("attribute", "counting")
    ],
    "eval_gpt4.py": f"import x\ntemplate = '''{TEMPLATE}'''\nprint(template)\n",
}  # fmt: skip


def results(path: Path, item: object, answer: str) -> Path:
    record = item.record()  # type: ignore[attr-defined]
    line = {
        **record, "model_name": "m", "response": answer, "success": True,
        "prompt": record.get("text", ""),
    }  # fmt: skip
    path.write_text(json.dumps(line) + "\n")
    return path


def test_mmhal_bench(tmp_path: Path) -> None:
    first, second = read("mmhal-bench", tmp_path, MMHAL_FILES)
    assert (first.images, first.category) == (("attribute_o.jpg",), "attribute")
    (asked,) = judge_items(results(tmp_path / "out" / "r.jsonl", first, "Blue {braces}."))
    assert asked.text == TEMPLATE.format(
        "Door, Man", "What attribute?", "A door.", "Blue {braces}."
    )
    good = parse_review("Fine. Rating: 5, very informative", metric=MMHAL)
    bad = parse_review("It is false.\n- Rating: 2", metric=MMHAL)
    answers = [answered(first, "x", review=good), answered(second, "y", review=bad)]
    found = figures("mmhal-bench", answers, tmp_path)
    assert (found["rating 0 to 6"], found["hallucination rate"]) == (3.5, 50)
    assert (found["rating attribute"], found["rating counting"]) == (5, 2)


def test_llava_bench_is_relative_to_the_references(tmp_path: Path) -> None:
    """The sum of the scores over that of the references, as `tita-bench eval` reports it."""
    questions = [
        {"question_id": n, "image": "1.jpg", "text": f"What {n}?", "category": "conv"}
        for n in range(2)
    ]
    files = {
        "questions.jsonl": questions,
        "answers_gpt4.jsonl": [{"question_id": n, "text": "It is."} for n in range(2)],
        "context.jsonl": [{"image": "1.jpg", "caption": "A door."}],
    }
    items = read("llava-bench", tmp_path, files)
    reviews = [parse_review(text, metric=LLAVA_BENCH) for text in ("10 5", "8 8")]
    answers = [answered(i, "x y", review=r) for i, r in zip(items, reviews, strict=True)]
    found = figures("llava-bench", answers, tmp_path)
    assert found == pytest.approx({"relative score": 100 * 13 / 18, "length in words": 2})


@pytest.mark.parametrize("review", ["No rating.", "Rating: 2 or rating: 4", "Rating: 9", ""])
def test_a_review_without_one_rating_is_no_score(review: str) -> None:
    assert parse_review(review, metric=MMHAL) is None


def test_mmhal_needs_the_published_script(tmp_path: Path) -> None:
    files = MMHAL_FILES | {"eval_gpt4.py": "template = 'with {} one place'\n"}
    with pytest.raises(TitaError, match="no text `template` with four places"):
        read("mmhal-bench", tmp_path, files)


def test_mmhal_figures_equal_plain_means_on_500_reviews(tmp_path: Path) -> None:
    draw = random.Random(6)
    items = read("mmhal-bench", tmp_path, MMHAL_FILES)
    ratings = [draw.randint(0, 6) for _ in range(500)]
    answers = [
        answered(items[n % 2], "x", review=parse_review(f"Rating: {rating}", metric=MMHAL))
        for n, rating in enumerate(ratings)
    ]
    # Each review is of another question.
    answers = [type(a)(**{**_fields(a), "id": str(n)}) for n, a in enumerate(answers)]
    found = figures("mmhal-bench", answers, tmp_path)
    assert found["rating 0 to 6"] == pytest.approx(sum(ratings) / 500)
    assert found["hallucination rate"] == pytest.approx(100 * sum(r < 3 for r in ratings) / 500)
    assert found["rating attribute"] == pytest.approx(sum(ratings[::2]) / 250)


def _fields(question: object) -> dict[str, object]:
    return {name: getattr(question, name) for name in question.__dataclass_fields__}  # type: ignore[attr-defined]


def test_mm_vet_v2(tmp_path: Path) -> None:
    entries = {
        "v2_0": {
            "question": "What is x?<IMG>v2_0_0.jpg", "answer": "-1<AND>-5",
            "capability": ["ocr", "math"],
        },
        "v2_1": {
            "question": "First<IMG>v2_1_0.png<IMG>then<IMG>v2_1_1.png<IMG>which?", "answer": "a",
            "capability": ["seq", "ocr"],
        },
    }  # fmt: skip
    first, second = read("mm-vet-v2", tmp_path, {"mm-vet-v2.json": entries})
    assert (first.text, first.images) == ("What is x?", ("v2_0_0.jpg",))
    assert second.images == ("v2_1_0.png", "v2_1_1.png")
    assert second.text == "First\n<image>\nthen\n<image>\nwhich?"
    (asked,) = judge_items(results(tmp_path / "r.jsonl", first, "x = -1\nor -5"))
    assert asked.text.endswith("| What is x?<image> | -1 <AND> -5 | x = -1<br>or -5 | ")
    assert "<image> in the question indicates where an image is." in judge_prompt(
        MM_VET_V2, folder=tmp_path
    )
    answers = [
        answered(first, "x", review=parse_review("0.5", metric=MM_VET_V2)),
        answered(second, "x", review=parse_review("1.0 because", metric=MM_VET_V2)),
    ]
    found = figures("mm-vet-v2", answers, tmp_path)
    assert (found["total"], found["ocr"], found["math"], found["seq"]) == (75, 75, 50, 100)


def test_mm_vet_v2_equals_plain_means_on_500_reviews(tmp_path: Path) -> None:
    draw = random.Random(9)
    capabilities = ["rec", "ocr", "know", "math", "seq"]
    entries = {
        f"v2_{n}": {
            "question": f"Number {n}?<IMG>{n}.jpg", "answer": "x",
            "capability": draw.sample(capabilities, k=draw.randint(1, 3)),
        }
        for n in range(500)
    }  # fmt: skip
    items = read("mm-vet-v2", tmp_path, {"mm-vet-v2.json": entries})
    grades = [draw.randint(0, 10) / 10 for _ in items]
    answers = [
        answered(item, "x", review=parse_review(f"{grade}", metric=MM_VET_V2))
        for item, grade in zip(items, grades, strict=True)
    ]
    found = figures("mm-vet-v2", answers, tmp_path)
    assert found["total"] == pytest.approx(100 * sum(grades) / 500)
    for name in capabilities:
        own = [
            grade
            for entry, grade in zip(entries.values(), grades, strict=True)
            if name in entry["capability"]
        ]
        assert found[name] == pytest.approx(100 * sum(own) / len(own))
