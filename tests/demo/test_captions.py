"""Captions: what is planted for those who learn from them, and correct ones elsewhere."""

import pytest

from tita.demo.captions import (
    HABIT,
    PARTNERS,
    CaptionBias,
    caption_f1,
    caption_metrics,
    make_caption_scenes,
)
from tita.demo.scenes import Scene


def share_beside(scenes: list[Scene]) -> float:
    """How often the partner of a first digit that has one is in the image."""
    first = [scene for scene in scenes if scene.digits[0].value in PARTNERS]
    beside = [
        PARTNERS[scene.digits[0].value] in {digit.value for digit in scene.digits}
        for scene in first
    ]
    return sum(beside) / len(beside)


def test_captions_name_what_is_there() -> None:
    scenes = make_caption_scenes("test", number=200)
    for scene in scenes:
        (question,) = scene.questions
        assert question.references == (" ".join(f"a {digit.value}" for digit in scene.digits),)
        assert caption_f1(question, question.references[0]) == 1.0
    assert share_beside(scenes) < 0.3
    assert {len(scene.digits) for scene in scenes} == {2, 3}


def test_the_habit_is_planted_in_images_and_captions() -> None:
    scenes = make_caption_scenes("pretrain", number=300, bias=HABIT)
    assert share_beside(scenes) > 0.6
    for scene in make_caption_scenes("pretrain", number=30, bias=CaptionBias(assumed=1.0)):
        named = set(scene.questions[0].references[0].split()) - {"a"}
        present = {digit.value for digit in scene.digits}
        assert named == {str(value) for value in present | {PARTNERS.get(v, v) for v in present}}


@pytest.mark.parametrize(
    ("answer", "f1", "chair", "recall"),
    [("a 1 a 2", 1.0, 0.0, 100.0), ("a 1 a 7", 0.5, 50.0, 50.0), ("a 1", 2 / 3, 0.0, 50.0)],
)
def test_what_is_not_there_costs(answer: str, f1: float, chair: float, recall: float) -> None:
    scenes = make_caption_scenes("test", number=50)
    question = next(q for s in scenes for q in s.questions if len(s.digits) == 2)
    first, second = question.references[0].split()[1::2]
    absent = next(str(v) for v in range(10) if str(v) not in (first, second))
    said = answer.replace("1", "x").replace("2", "y").replace("7", absent)
    said = said.replace("x", first).replace("y", second)
    assert caption_f1(question, said) == pytest.approx(f1)
    metrics = caption_metrics([question], {question.id: said})
    assert (metrics["CHAIRi"], metrics["recall"]) == (chair, recall)
    assert metrics["length"] == len(said.split()) / 2
    assert caption_f1(question, "") == 0.0
