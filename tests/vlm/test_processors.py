"""Processors of older checkpoints are completed; video parts load without torchvision."""

import json
import logging
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
from transformers.utils import is_timm_available, is_torchvision_available

from tests.families import FAMILIES, ernie4_5_vl_moe, gemma4, pixtral, saved
from tita.demo.models import demo_model_path
from tita.errors import TitaError
from tita.vlm.inputs import prepare
from tita.vlm.loading import load_vlm, translate_load_errors
from tita.vlm.processors import load_processor
from tita.vlm.prompts import Prompt, Turn, prompt_text

IMAGE = PIL.Image.new("RGB", (32, 32), "red")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The demo's reward model in the format of early 2024."""
    folder = tmp_path / "old"
    shutil.copytree(demo_model_path("reward"), folder)
    written = json.loads((folder / "processor_config.json").read_text())
    images = {**written["image_processor"], "processor_class": "LlavaProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").unlink()
    (folder / "chat_template.jinja").unlink()
    return folder


def test_missing_settings_come_from_the_model_configuration(
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


def test_a_text_model_is_refused_by_its_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    wanted = "a model of type 'llama', which is no vision-language model; name a model that takes"
    with pytest.raises(TitaError, match=f"^{tmp_path}: {wanted}"):
        load_vlm(str(tmp_path))


@pytest.mark.parametrize("kind", ["pi0", "diffusion_gemma"])
def test_a_model_that_generates_no_tokens_is_refused_by_its_type(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    wanted = f"a model of type '{kind}', which does not generate text token by token; name another"
    with pytest.raises(TitaError, match=wanted):
        load_processor(tmp_path, where=str(tmp_path))


def test_default_template_is_llavas(old: Path) -> None:
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


def test_missing_image_processor_is_an_error(old: Path) -> None:
    (old / "preprocessor_config.json").unlink()
    with pytest.raises(TitaError, match=r"old: .*image processor"):
        load_vlm(str(old))


@pytest.mark.parametrize("name", ["qwen2_vl", "smolvlm"])
def test_video_settings_are_kept_without_torchvision(name: str, tmp_path: Path) -> None:
    videos = {"video_processor_type": "Qwen2VLVideoProcessor", "max_frames": 7}
    config = FAMILIES[name](tmp_path)
    for folder in (tmp_path, tmp_path / "again"):
        config.save_pretrained(folder)
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(videos))
    first = load_processor(str(tmp_path), where=name)
    first.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "processor_config.json").read_text())
    assert written["video_processor"].items() >= videos.items()
    assert written["processor_class"] == type(first).__name__
    again = load_processor(str(tmp_path / "again"), where=name)
    assert again.to_json_string() == first.to_json_string()
    images = Prompt(text="what number ?", images=(IMAGE,))
    assert prompt_text(again, images) == prompt_text(first, images)


@pytest.mark.skipif(is_torchvision_available(), reason="it needs a real font then")
@pytest.mark.parametrize("has_font", [True, False])
def test_a_processor_with_a_font_is_saved(has_font: bool, tmp_path: Path) -> None:
    """ERNIE 4.5 VL writes times of frames with it; a run failed when it saved its model."""
    folder, again = tmp_path / "m", tmp_path / "again"
    folder.mkdir()
    ernie4_5_vl_moe(folder).save_pretrained(folder)
    if has_font:
        (folder / "video_preprocessor_config.json").write_text(json.dumps({"font": "a.ttf"}))
        (folder / "a.ttf").write_bytes(b"font")
    load_processor(str(folder), where="ernie").save_pretrained(again)
    assert (again / "a.ttf").is_file() == has_font
    assert (again / "processor_config.json").is_file()


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is there")
def test_missing_torchvision_is_reported(tmp_path: Path) -> None:
    with pytest.raises(TitaError, match=r"torchvision.*; install the torchvision built for this"):
        load_vlm(str(saved(pixtral, tmp_path)))


@pytest.mark.skipif(is_timm_available(), reason="timm is there")
@pytest.mark.parametrize("family", ["fast_vlm", "gemma3n"])
def test_missing_timm_is_reported(family: str, tmp_path: Path) -> None:
    """Their towers are timm's."""
    shutil.copytree(demo_model_path("base"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(TitaError, match=r"requires the timm library.*; pip install timm$"):
        load_vlm(tmp_path)


@pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is missing")
def test_pixtral_keeps_its_own_settings(tmp_path: Path) -> None:
    """It is of the type of LLaVA, whose processors are completed."""
    processor = load_vlm(str(saved(pixtral, tmp_path))).processor
    assert type(processor).__name__ == "PixtralProcessor"


def test_a_processor_of_sounds_loads_without_torchvision(tmp_path: Path) -> None:
    config = gemma4(tmp_path)
    config.save_pretrained(tmp_path)
    processor = load_processor(str(tmp_path), where="gemma4")
    assert type(processor.feature_extractor).__name__ == "Gemma4AudioFeatureExtractor"


def test_incompatible_torchvision_is_reported() -> None:
    """The exception of transformers for a torchvision built for another torch."""
    error = ModuleNotFoundError("Could not import module 'AutoProcessor'")
    error.__cause__ = RuntimeError("operator torchvision::nms does not exist")
    told = pytest.raises(
        TitaError, match=r"^m: .*torchvision::nms.*; install the torchvision built"
    )
    with told, translate_load_errors("m"):
        raise error
