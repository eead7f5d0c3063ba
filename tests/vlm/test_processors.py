"""Checkpoints that came before processors knew patches and templates are asked like any others."""

import json
import logging
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch

from tita.demo.models import demo_model_path
from tita.errors import TitaError
from tita.vlm import Prompt, Turn, load_vlm, prepare, prompt_text

IMAGE = PIL.Image.new("RGB", (32, 32), "red")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The demo's reward model as it would have been saved in early 2024."""
    folder = tmp_path / "old"
    shutil.copytree(demo_model_path("reward"), folder)
    written = json.loads((folder / "processor_config.json").read_text())
    images = {**written["image_processor"], "processor_class": "LlavaProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").unlink()
    (folder / "chat_template.jinja").unlink()
    return folder


def test_what_is_missing_comes_from_the_models_configuration(
    old: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        vlm = load_vlm(str(old))
    assert f"{old} has no chat template" in caplog.text
    ours = load_vlm(str(demo_model_path("reward"))).processor
    names = ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")
    assert [getattr(vlm.processor, each) for each in names] == [getattr(ours, e) for e in names]
    inputs = prepare(vlm, [Prompt(text="what number ?", images=(IMAGE,))])
    assert int((inputs["input_ids"] == vlm.processor.image_token_id).sum()) == 4
    with torch.inference_mode():
        assert vlm.model(**inputs).logits.isfinite().all()


def test_the_template_is_that_of_llava(old: Path) -> None:
    processor = load_vlm(str(old)).processor
    question = Prompt(text="What is this?", images=(IMAGE,))
    assert prompt_text(processor, question) == "USER: <image>\nWhat is this? ASSISTANT:"
    turns = (
        Turn(role="system", parts=("Be brief.",)),
        Turn(role="user", parts=(IMAGE, "What is this?")),
        Turn(role="assistant", parts=("Red.",)),
        Turn(role="user", parts=("Sure?",)),
    )
    assert prompt_text(processor, Prompt(turns=turns)) == (
        "Be brief. USER: <image>\nWhat is this? ASSISTANT: Red. </s>USER: Sure? ASSISTANT:"
    )


def test_a_model_without_image_processor_is_told(old: Path) -> None:
    (old / "preprocessor_config.json").unlink()
    with pytest.raises(TitaError, match=r"old: .*image processor"):
        load_vlm(str(old))
