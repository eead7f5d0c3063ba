"""The models of the package: they load in transformers, see, and are biased."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from tita.align import Engine, Guidance
from tita.demo.answers import Asker, Questions, ask, no_progress
from tita.demo.experiment import Answers, by_category
from tita.demo.methods import BASE, Condition
from tita.demo.models import demo_model_path
from tita.demo.pretrain import pixel_values
from tita.demo.scenes import Scene, make_scenes, usual_ink, write_scenes
from tita.demo.tiny_llava import make_processor
from tita.records import Question
from tita.vlm.images import open_image
from tita.vlm.inputs import prepare
from tita.vlm.loading import VLM, Models, load_vlm
from tita.vlm.prompts import Prompt

NUM_SCENES = 120


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return make_scenes("test", number=NUM_SCENES)


@pytest.fixture(scope="module")
def base() -> VLM:
    return load_vlm(str(demo_model_path("base")))


@pytest.fixture(scope="module")
def answered(
    base: VLM, scenes: list[Scene], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Question], Answers]:
    root = tmp_path_factory.mktemp("scenes")
    questions = write_scenes(root, scenes, name="test")
    split = Questions(items=questions, folder=root)
    found = ask(Engine(Models(base)), split, BASE.ways[0], advance=no_progress)
    return questions, found.answers


def test_a_condition_is_asked_once_whatever_its_name(
    base: VLM, scenes: list[Scene], tmp_path: Path
) -> None:
    split = Questions(items=write_scenes(tmp_path, scenes[:2], name="test"), folder=tmp_path)
    told: list[tuple[float, str]] = []
    asker = Asker(base=base, rewards={}, advance=lambda n=1, *, note="": told.append((n, note)))
    first = asker.ask(split, Condition(name="base"), split="test")
    assert asker.ask(split, Condition(name="again"), split="test") is first
    assert asker.ask(split, Condition(name="base"), split="validation") is not first
    vcd = Condition(name="base", guidance=Guidance.of(form="vcd"))
    assert asker.ask(split, vcd, split="test") is not first
    assert told == [(6, "base"), (6, "again"), (6, "base"), (6, "base")]


@pytest.mark.parametrize("role", ["base", "reward"])
def test_transformers_loads_the_models(role: str) -> None:
    path = demo_model_path(role)  # type: ignore[arg-type]
    model = AutoModelForImageTextToText.from_pretrained(path)
    assert isinstance(model, LlavaForConditionalGeneration)
    assert AutoProcessor.from_pretrained(path).chat_template
    assert "make demo-models" in (path / "README.md").read_text()


def test_sizes_and_vocabularies(base: VLM) -> None:
    reward = load_vlm(str(demo_model_path("reward")))
    assert reward.model.num_parameters() < 0.4 * base.model.num_parameters()
    assert base.tokenizer.get_vocab() == reward.tokenizer.get_vocab()
    weights = [demo_model_path(role) / "model.safetensors" for role in ("base", "reward")]
    assert sum(path.stat().st_size for path in weights) < 4 << 20


def test_the_base_model_sees_and_is_biased(
    scenes: list[Scene], answered: tuple[list[Question], Answers]
) -> None:
    questions, answers = answered
    scores = by_category(questions, answers)
    assert scores["reading"].accuracy > 0.8
    assert scores["existence"].accuracy > 0.75
    # 0.25 is chance; a higher score leaves nothing to correct.
    assert 0.3 < scores["attribute"].accuracy < 0.75
    wrong_by_bias = wrong = 0
    for scene in scenes:
        question = scene.questions[1]
        answer = answers[question.id]
        asked = int(question.text.split()[-1].rstrip("?"))
        if answer not in question.references:
            wrong += 1
            wrong_by_bias += answer == usual_ink(asked)
    assert wrong_by_bias > 0.8 * wrong


def test_training_pixels_equal_the_processors(
    base: VLM, scenes: list[Scene], tmp_path: Path
) -> None:
    questions = write_scenes(tmp_path, scenes[:4], name="few")[::3]
    prompts = [
        Prompt(text=question.text, images=(open_image(tmp_path / str(question.image)),))
        for question in questions
    ]
    torch.testing.assert_close(
        prepare(base, prompts)["pixel_values"], pixel_values(scenes[:4]), atol=1e-6, rtol=0
    )


def test_the_processor_tokenizes_words_and_image(scenes: list[Scene]) -> None:
    processor = make_processor()
    text = "<s>user: <image> What number is written? assistant:"
    tokens = processor.tokenizer.convert_ids_to_tokens(
        processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    )
    question = ["what", "number", "is", "written", "?"]
    assert tokens == ["<s>", "user:", "<image>", *question, "assistant:"]
