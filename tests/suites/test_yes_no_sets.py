"""POPE over its splits and HallusionBench: hand-worked answers, and other implementations."""

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import f1_score

from tests.suites.published import answered, figures, read


def pope_file(split: str, labels: list[str], *, first: int = 1) -> dict[str, Any]:
    return {
        f"coco_pope_{split}.json": [
            {
                "question_id": n, "image": f"COCO_val2014_{n // 6:012d}.jpg",
                "text": f"Is there a thing {n} in the image?", "label": label,
            }
            for n, label in enumerate(labels, start=first)
        ]
    }  # fmt: skip


def test_pope_is_the_mean_of_its_splits(tmp_path: Path) -> None:
    files = pope_file("random", ["yes", "no"]) | pope_file("popular", ["yes", "no", "no"])
    items = read("pope", tmp_path, files)
    by_id = {item.id: item for item in items}
    said = {
        "random-1": "Yes.", "random-2": "No", "popular-1": "No.", "popular-2": "I see one, yes",
        "popular-3": "no",
    }  # fmt: skip
    answers = [answered(by_id[name], text) for name, text in said.items()]
    found = figures("pope", answers, tmp_path)
    # The adversarial split was not asked, so that it is no part of the mean.
    assert (found["F1 random"], found["F1 popular"]) == (100, 0)
    assert found["F1 mean of splits"] == 50
    assert found["accuracy mean of splits"] == pytest.approx((100 + 100 / 3) / 2)
    assert found["yes ratio"] == 40
    assert "F1 adversarial" not in found


def test_an_answer_that_is_neither_yes_nor_no_is_wrong_and_no_yes(tmp_path: Path) -> None:
    items = read("pope", tmp_path, pope_file("random", ["yes", "no"]))
    found = figures("pope", [answered(item, "A dog.") for item in items], tmp_path)
    assert (found["accuracy mean of splits"], found["yes ratio"], found["recall"]) == (0, 0, 0)
    assert "precision" not in found


def test_pope_equals_sklearn_on_500_answers(tmp_path: Path) -> None:
    draw = random.Random(2)
    files: dict[str, Any] = {}
    for split, number in (("random", 150), ("popular", 170), ("adversarial", 180)):
        files |= pope_file(split, draw.choices(["yes", "no"], k=number))
    items = read("pope", tmp_path, files)
    assert len(items) == 500
    said = {item.id: draw.choice(["Yes", "no.", "No, it is not.", "yes!"]) for item in items}
    found = figures("pope", [answered(item, said[item.id]) for item in items], tmp_path)
    scores = []
    for split in ("random", "popular", "adversarial"):
        own = [item for item in items if item.category == split]
        truth = [item.references[0] == "yes" for item in own]
        guess = [said[item.id].lower().startswith("yes") for item in own]
        scores.append(100 * f1_score(truth, guess))
        assert found[f"F1 {split}"] == pytest.approx(scores[-1])
    assert found["F1 mean of splits"] == pytest.approx(sum(scores) / 3)


def hallusion_entry(identity: str, answer: str) -> dict[str, Any]:
    category, sub, of_set, figure, question = identity.split("_")
    return {
        "category": category, "subcategory": sub, "set_id": of_set, "figure_id": figure,
        "question_id": question, "question": f"Is it {identity}?", "gt_answer": answer,
        "visual_input": "0" if category == "VS" and figure == "0" else "1", "filename": None,
        "gt_answer_details": "",
    }  # fmt: skip


def test_hallusionbench(tmp_path: Path) -> None:
    entries = [
        hallusion_entry("VD_ocr_1_0_0", "1"),
        hallusion_entry("VD_ocr_1_0_1", "0"),
        hallusion_entry("VD_ocr_1_1_0", "0"),
        hallusion_entry("VS_map_1_0_0", "1"),
        hallusion_entry("VS_map_1_1_0", "1"),
    ]
    items = read("hallusionbench", tmp_path, {"HallusionBench.json": entries})
    assert items[1].images == ("VD/ocr/1_0.png",)
    assert items[3].images == ()
    said = ["Yes", "No.", "Yes, it is.", "It is not clear.", "It is not clear."]
    answers = [answered(item, text) for item, text in zip(items, said, strict=True)]
    found = figures("hallusionbench", answers, tmp_path)
    # An unclear answer is right without the figure (VS, figure 0), and wrong with it.
    assert found["aAcc"] == pytest.approx(100 * 3 / 5)
    # Figures: VD 1_0 right, VD 1_1 wrong, VS 1_1 wrong; VS 1_0 is no figure.
    assert found["fAcc"] == pytest.approx(100 / 3)
    # Question pairs: VD 0 wrong, VD 1 right, VS 0 wrong.
    assert found["qAcc"] == pytest.approx(100 / 3)


def test_hallusionbench_equals_another_implementation_on_500_answers(tmp_path: Path) -> None:
    draw = random.Random(3)
    names = {
        f"{kind}_{draw.choice('ab')}_{draw.randint(0, 9)}_{draw.randint(0, 3)}_{draw.randint(0, 4)}"
        for kind in draw.choices(["VD", "VS"], k=1500)
    }
    entries = [hallusion_entry(name, draw.choice("01")) for name in sorted(names)][:500]
    items = read("hallusionbench", tmp_path, {"HallusionBench.json": entries})
    assert len(items) == 500
    said = {item.id: draw.choice(["yes", "no", "unclear"]) for item in items}
    found = figures("hallusionbench", [answered(i, said[i.id]) for i in items], tmp_path)
    right: dict[str, bool] = {}
    for entry, item in zip(entries, items, strict=True):
        judged = {"yes": "1", "no": "0", "unclear": "2"}[said[item.id]]
        unclear_is_right = entry["category"] == "VS" and int(entry["figure_id"]) == 0
        right[item.id] = judged == entry["gt_answer"] or (judged == "2" and unclear_is_right)
    by_figure, by_pair = defaultdict(list), defaultdict(list)
    for name, is_right in right.items():
        category, sub, of_set, figure, question = name.split("_")
        by_pair[category, sub, of_set, question].append(is_right)
        if not (category == "VS" and figure == "0"):
            by_figure[category, sub, of_set, figure].append(is_right)
    share = lambda groups: 100 * sum(map(all, groups)) / len(groups)  # noqa: E731
    assert found["aAcc"] == pytest.approx(100 * sum(right.values()) / 500)
    assert found["fAcc"] == pytest.approx(share(by_figure.values()))
    assert found["qAcc"] == pytest.approx(share(by_pair.values()))
