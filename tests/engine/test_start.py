"""Which engine runs which models, and what is refused before any weights are loaded."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoConfig, LlavaConfig

from tests import families as tiny
from tita.align import Engine, Guidance, Request, Sampling
from tita.align.forms import VIEW_FORMS
from tita.align.prompts import Preparer
from tita.align.requests import EngineOptions
from tita.cli.engine_arguments import EngineChoice
from tita.cli.serve import serve
from tita.demo.models import demo_model_path
from tita.demo.scenes import make_scenes
from tita.engine.engine_options import VllmOptions
from tita.engine.start import require_engine
from tita.engine.transformers_batch import TransformersBatch
from tita.errors import TitaError
from tita.infer.options import InferOptions
from tita.serve.model_loading import load_models
from tita.serve.serve_options import LoadOptions, ServeOptions
from tita.vllm_plugin.families import FAMILIES, DraftOverrides, config_overrides
from tita.vllm_plugin.outline import load_outline
from tita.vlm.loading import Models, load_vlm

BASE, REWARD = (str(demo_model_path(role)) for role in ("base", "reward"))
NAMES = {"base": "b", "reward": "r"}
has_vllm = importlib.util.find_spec("vllm") is not None


def picture(pixels: np.ndarray) -> PIL.Image.Image:
    return PIL.Image.fromarray((255 * pixels).round().astype("uint8"))


def run_tita(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tita", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_overrides_of_a_pair() -> None:
    configs = {
        "base": AutoConfig.from_pretrained(BASE),
        "reward": AutoConfig.from_pretrained(REWARD),
    }
    found = config_overrides(configs, {"base": BASE, "reward": REWARD}, names=NAMES)
    assert found == {
        "architectures": ["TitaGuidedLlavaForConditionalGeneration"],
        "tita_models": {"reward": REWARD},
        "tita_adapters": [],
        "text_config": {"projection_dim": 96 + 64},
    }


def test_overrides_of_a_drafting_pair() -> None:
    """vLLM applies them to the configurations of base and draft model."""
    combined = {"architectures": ["C"], "tita_models": {"reward": "r"}, "text_config": {"x": 1}}
    overrides = DraftOverrides(combined=combined, drafter="r", draft_class="D")
    base = overrides(LlavaConfig(name_or_path="b", architectures=["A"]))
    assert (base.architectures, base.tita_models, base.text_config.x) == (["C"], {"reward": "r"}, 1)
    reward = overrides(LlavaConfig(name_or_path="r", architectures=["A"]))
    assert reward.architectures == ["D"]
    assert not hasattr(reward, "tita_models")


def test_an_architecture_without_a_combined_model_is_refused(tmp_path: Path) -> None:
    config = tiny.gemma3(tmp_path)
    config.architectures = ["Gemma3ForConditionalGeneration"]
    with pytest.raises(TitaError, match="engine vllm does not support Gemma3") as caught:
        config_overrides({"base": config}, {"base": "b"}, names=NAMES)
    assert "--engine transformers" in str(caught.value)


def test_models_of_two_architectures_are_refused(tmp_path: Path) -> None:
    reward = tiny.llava_next(tmp_path)
    reward.architectures = ["LlavaNextForConditionalGeneration"]
    base = LlavaConfig(architectures=["LlavaForConditionalGeneration"])
    with pytest.raises(
        TitaError, match=r"the reward model is a LlavaNext.* the base model a Llava"
    ):
        config_overrides({"base": base, "reward": reward}, NAMES, names=NAMES)


def test_every_family_names_its_image_tensors() -> None:
    assert all("pixel_values" in family.tensors for family in FAMILIES.values())


@pytest.mark.skipif(has_vllm, reason="vLLM is installed here")
def test_engine_vllm_that_is_not_installed() -> None:
    with pytest.raises(TitaError, match="engine vllm is not installed"):
        require_engine("vllm")
    found = run_tita("infer", "--base", BASE, "--question", "x", "--engine", "vllm")
    assert found.returncode == 2
    assert "pip install 'tita[vllm]'" in found.stderr
    assert "Traceback" not in found.stderr


def test_options_of_vllm_without_it() -> None:
    found = run_tita("serve", "--base", BASE, "--tensor-parallel-size", "2")
    assert found.returncode == 2
    assert "--tensor-parallel-size without --engine vllm" in found.stderr


def test_options_that_vllm_has_not() -> None:
    with pytest.raises(TitaError, match="--quantization with --engine vllm"):
        LoadOptions(base="b", engine="vllm", quantization="4bit")
    with pytest.raises(TitaError, match="--device-map with --engine vllm"):
        InferOptions(base="b", engine="vllm", device_map="auto")
    for form in sorted(VIEW_FORMS):
        with pytest.raises(TitaError, match=f"--form {form} with --engine vllm"):
            LoadOptions(base="b", reward="r", engine="vllm", guidance=Guidance.of(form=form))
        with pytest.raises(TitaError, match=f"--form {form} with --engine vllm"):
            InferOptions(base="b", reward="r", engine="vllm", form=form)
    with pytest.raises(TitaError, match="--max-draft-rows with --engine vllm"):
        ServeOptions(engine_name="vllm", engine=EngineOptions(max_draft_rows=3))
    with pytest.raises(TitaError, match="--pack with --engine vllm"):
        ServeOptions(engine_name="vllm", engine=EngineOptions(pack=True))
    with pytest.raises(TitaError, match="memory_share is 2"):
        VllmOptions(memory_share=2)
    with pytest.raises(TitaError, match="max_drafts is -1"):
        VllmOptions(max_drafts=-1)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"node_rank": 1}, "node rank 1 of 1 nodes"),
        ({"num_nodes": 2, "leader_address": "a"}, "1 GPUs cannot be distributed over 2 nodes"),
        ({"num_nodes": 2, "tensor_parallel": 2}, "--nnodes without --master-addr"),
    ],
)
def test_machines_that_do_not_fit_together(given: dict[str, Any], fault: str) -> None:
    with pytest.raises(TitaError, match=fault):
        VllmOptions(**given)


def test_lines_of_an_answers_file_name_the_second_engine_only() -> None:
    assert "engine" not in InferOptions(base="b").describe()
    assert InferOptions(base="b", engine="vllm").describe()["engine"] == "vllm"


def test_outlines_prepare_the_same_inputs() -> None:
    scene = make_scenes("validation", number=1)[0]
    loaded = Models(load_vlm(BASE), load_vlm(REWARD))
    outlined = Models(load_outline(BASE), load_outline(REWARD))
    request = Request(
        question=scene.questions[0].text, images=(picture(scene.pixels),), guidance=Guidance()
    )
    ours, theirs = (Preparer(models).prepare(request) for models in (outlined, loaded))
    assert ours.inputs.keys() == theirs.inputs.keys()
    for role, inputs in theirs.inputs.items():
        for name, tensor in inputs.items():
            assert torch.equal(tensor.cpu(), ours.inputs[role][name]), (role, name)
    fields = {f.name for f in dataclasses.fields(ours)} - {"request", "inputs"}
    assert all(getattr(ours, name) == getattr(theirs, name) for name in fields)


def test_the_step_engine_answers_as_the_engine_does() -> None:
    scene = make_scenes("validation", number=1)[0]
    engine = Engine(Models(load_vlm(BASE), load_vlm(REWARD)))
    batch = TransformersBatch(engine, max_batch=4)
    request = Request(
        question=scene.questions[0].text,
        images=(picture(scene.pixels),),
        guidance=Guidance(weight=0.5),
        sampling=Sampling(max_new_tokens=8, ignore_end=True),
    )
    batch.admit("a", batch.preparer.prepare(request))
    batch.admit("b", batch.preparer.prepare(request))
    batch.step()
    assert batch.counts().num_sequences == 2
    assert batch.counts().kv_usage > 0
    batch.release("b")
    tokens = []
    while len(batch):
        for key, outcome in batch.step():
            assert not isinstance(outcome, TitaError)
            tokens += [outcome.id] * (key == "a")
    (answer,) = engine.generate([request])
    # The first token came in the first step.
    assert tuple(tokens) == answer.token_ids[-len(tokens) :]
    assert len(tokens) in (7, 8)
    counts = batch.counts()
    assert counts.num_sequences == 0
    assert counts.base_s > 0
    assert counts.reward_s > 0


def test_all_nodes_have_the_same_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker with less space for adapters than node 0 schedules for would end."""
    given: dict[str, Any] = {}

    def run(models: Models, vllm: VllmOptions, **options: Any) -> None:
        given.update(options, vllm=vllm)
        raise TitaError("enough")

    monkeypatch.setattr("tita.engine.start.run_worker_node", run)
    monkeypatch.setattr("tita.serve.model_loading.load_models", lambda _: SimpleNamespace(models=0))
    with pytest.raises(TitaError, match="enough"):
        serve(
            "b", engine=EngineChoice.VLLM, tensor_parallel_size=2, nnodes=2, node_rank=1,
            master_addr="node-0", max_adapters=20, max_batch=40, max_model_len=512,
        )  # fmt: skip
    assert given["engine_options"].max_adapters == 20
    assert (given["vllm"].max_batch, given["vllm"].max_model_len) == (40, 512)


def test_vllm_has_one_dtype_for_all_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`/v1/models` tells in which dtype a model runs, which is part of its digest."""
    half = tmp_path / "reward"
    shutil.copytree(REWARD, half)
    config = half / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float16"}))
    monkeypatch.setattr("tita.serve.model_loading.require_engine", lambda _: None)
    for dtype, found in (("auto", "float32"), ("bfloat16", "bfloat16")):
        loaded = load_models(LoadOptions(base=BASE, reward=str(half), engine="vllm", dtype=dtype))
        assert [loaded.base.dtype, loaded.rewards["reward"].dtype] == [found, found]
