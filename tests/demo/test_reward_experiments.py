"""The experiments of the image preference's terms and of two reward models at once."""

import json
from pathlib import Path

import pytest

from tita.demo.captions import QUESTION, caption_length, make_caption_scenes
from tita.demo.front_experiment import write_questions
from tita.demo.scenes import Split
from tita.demo.tasks import questions_task
from tita.demo.term_experiment import term_configs
from tita.recipes import TrainRecipe, validate_recipe

SCENES: dict[Split, int] = {"train": 1, "validation": 1, "test": 1}


def test_reward_models_differ_in_their_terms_alone() -> None:
    plain, *others = term_configs(questions_task(SCENES))
    assert "image_preference" not in plain.train
    weights = []
    for each in others:
        assert each.pairs == plain.pairs
        recipe = validate_recipe(TrainRecipe, {"model": "m", "pairs": "p", **each.train})
        assert recipe.image_preference is not None
        assert recipe.image_preference.anchor == 1
        weights.append(recipe.image_preference.weight)
        assert {**each.train, "image_preference": None} == {**plain.train, "image_preference": None}
    assert weights == [0, 1, 2]


@pytest.mark.parametrize(("answer", "length"), [("a 3 a 5", 2), ("a 3 a 3", 1), ("", 0)])
def test_length_of_a_caption_is_what_it_names(answer: str, length: int) -> None:
    assert caption_length(answer) == length


def test_questions_of_the_front_have_the_digits_of_their_scene(tmp_path: Path) -> None:
    """By CHAIR's reader, on all images, with the prompt that the models know."""
    scenes = make_caption_scenes("test", number=20)
    write_questions(tmp_path / "questions.jsonl", scenes)
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert len(rows) == len(scenes)
    by_image = {row["image"]: row for row in rows}
    for scene in scenes:
        (question,) = scene.questions
        row = by_image[question.image]
        assert row["text"] == QUESTION
        assert set(row["references"]) == {str(digit.value) for digit in scene.digits}
