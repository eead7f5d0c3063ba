"""Checkpoints that are incomplete or unusual: the right model, or one line with what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from safetensors.torch import load_file, save_file
from transformers.utils import is_torchvision_available

from tests.families import FAMILIES, ernie4_5_vl_moe, saved
from tita.demo.models import demo_model_path
from tita.errors import TitaError
from tita.recipes import TrainRecipe
from tita.train.model import load_model
from tita.vlm.loading import load_vlm
from tita.vlm.processors import load_processor
from tita.vlm.prompts import Prompt, prompt_text

QUERY = "language_model.model.layers.0.self_attn.q_proj.weight"
SHOWN = Prompt(text="what number ?", images=(PIL.Image.new("RGB", (32, 32), "red"),))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The demo's base model."""
    return Path(shutil.copytree(demo_model_path("base"), tmp_path / "m"))


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    return saved(FAMILIES["qwen2_vl"], tmp_path)


def change(file: Path, **fields: Any) -> None:
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | fields))


def change_weights(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def without_query(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop(QUERY))


def narrow_query(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({QUERY: weights[QUERY][:-1].clone()}))


def quantized(folder: Path) -> None:
    change(folder / "config.json", quantization_config={"quant_method": "own", "bits": 4})


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (without_query, r"its files lack 1 weight of the model, such as model\.language_model\.la"),
        (
            narrow_query,
            r"q_proj\.weight has the shape \[95, 96\], .* asks for \[96, 96\]; save the",
        ),
        (quantized, "quantized by 'own', which transformers does not know; name the model before"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(
    damage: Callable[[Path], None], fault: str, model: Path
) -> None:
    """transformers would give random values to those that it does not find."""
    damage(model)
    with pytest.raises(TitaError, match=f"^{model}: .*{fault}"):
        load_vlm(model)
    with pytest.raises(TitaError, match=f"^m: .*{fault}"):
        load_model(TrainRecipe(model="m", pairs="p", dtype="float32"), start=str(model))


def test_a_folder_with_a_model_and_an_adapter_is_an_error(model: Path) -> None:
    """transformers would add the adapter to a model into which it was merged already."""
    change(model / "adapter_config.json", base_model_name_or_path="x", peft_type="LORA")
    with pytest.raises(TitaError, match=r"a model and a LoRA adapter in one folder; move adapter_"):
        load_vlm(model)


def test_code_of_a_checkpoint_is_not_run(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks on a terminal, and runs it after `y`."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    change(model / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"})
    (model / "own.py").write_text(f"open({str(model / 'ran')!r}, 'w')")
    with pytest.raises(TitaError, match="choose a model that is part of transformers; code of a"):
        load_vlm(model)
    assert not (model / "ran").exists()


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("tokenizer.json", "save tokenizer.json beside it"),
        ("preprocessor_config.json", "copy preprocessor_config.json from the model"),
    ],
)
def test_a_missing_file_is_named(file: str, remedy: str, qwen: Path) -> None:
    (qwen / file).unlink()
    with pytest.raises(TitaError, match=remedy):
        load_vlm(qwen)


def test_an_incomplete_file_of_weights_is_to_be_downloaded_again(model: Path) -> None:
    weights = model / "model.safetensors"
    for content in (weights.read_bytes()[:-9], b"version https://git-lfs.github.com/spec/v1\n"):
        weights.write_bytes(content)
        with pytest.raises(TitaError, match="download the file of weights again; with Git, git"):
            load_vlm(model)


def test_tokens_that_are_to_be_ruled_out_are_named(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As Idefics has them; sampling defaults are those of requests, by intention."""
    change(model / "generation_config.json", temperature=0.5, do_sample=True)
    load_vlm(model)
    assert not caplog.text
    change(model / "generation_config.json", bad_words_ids=[[5]], suppress_tokens=[7])
    load_vlm(model)
    assert "generation_config.json has bad_words_ids, suppress_tokens, not applied" in caplog.text


@pytest.mark.parametrize("several", [False, True])
def test_the_template_of_the_tokenizer_is_taken(several: bool, qwen: Path) -> None:
    """Where the processor has none: some checkpoints have it in `tokenizer_config.json` alone."""
    wanted = prompt_text(load_processor(qwen, where="q"), SHOWN)
    template = (qwen / "chat_template.jinja").read_text()
    (qwen / "chat_template.jinja").unlink()
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": template}]
    change(qwen / "tokenizer_config.json", chat_template=named if several else template)
    assert prompt_text(load_processor(qwen, where="q"), SHOWN) == wanted


def test_a_template_of_the_tokenizer_without_images_is_not_taken(qwen: Path) -> None:
    (qwen / "chat_template.jinja").unlink()
    change(qwen / "tokenizer_config.json", chat_template="{{ messages[0].content }}")
    with pytest.raises(TitaError, match=r"^q: has no chat template"):
        prompt_text(load_processor(qwen, where="q"), SHOWN, where="q")


def test_several_templates_without_a_default_one_are_an_error(qwen: Path) -> None:
    (qwen / "additional_chat_templates").mkdir()
    (qwen / "chat_template.jinja").rename(qwen / "additional_chat_templates" / "tools.jinja")
    with pytest.raises(TitaError, match=r"^q: has several chat templates \(tools\), none of them"):
        load_processor(qwen, where="q")


@pytest.mark.skipif(is_torchvision_available(), reason="it needs a real font then")
def test_the_font_of_a_hub_model_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ERNIE 4.5 VL's processor needs it wherever torchvision is installed."""
    hub, commit = tmp_path / "hub" / "models--a--ernie", "a" * 40
    folder = hub / "snapshots" / commit
    for new in (hub / "refs", folder):
        new.mkdir(parents=True)
    (hub / "refs" / "main").write_text(commit)
    ernie4_5_vl_moe(folder).save_pretrained(folder)
    (folder / "video_preprocessor_config.json").write_text(json.dumps({"font": "a.ttf"}))
    (folder / "a.ttf").write_bytes(b"font")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub.parent))
    load_processor("a/ernie", where="a/ernie").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "a.ttf").read_bytes() == b"font"
