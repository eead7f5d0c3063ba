"""Reward models as LoRA adapters: vLLM's answers equal those of the transformers engine."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="engine vllm is not installed: run make test-vllm")

from tests import families
from tests.adapters import save_adapter
from tests.vllm.engines import (
    answers,
    assert_same,
    mixed_requests,
    reference_engine,
    vllm_batch,
)
from tests.vllm.test_families import build
from tita.align import Guidance
from tita.demo.models import demo_model_path
from tita.engine.engine_options import VllmOptions
from tita.engine.vllm_engine import load_outlines, start_vllm
from tita.errors import TitaError
from tita.vlm.loading import load_vlm

KINDS: dict[str, dict[str, Any]] = {
    "faithful": {},
    "brief": {"r": 8, "use_rslora": True},
    "polite": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 2},
    },
}


def adapters(below: str, folder: Path, kinds: dict[str, dict[str, Any]]) -> dict[str, str]:
    model = load_vlm(below).model
    return {
        name: str(save_adapter(model, folder / name, base=below, seed=seed, **kind))
        for seed, (name, kind) in enumerate(kinds.items())
    }


def test_adapters_share_one_model(tmp_path: Path) -> None:
    """Three adapters, two of which fit into memory, and a merged model beside them."""
    base, below = (str(demo_model_path(role)) for role in ("base", "reward"))
    named = adapters(below, tmp_path, KINDS)
    paths = {"base": base, **named, "whole": below, "reference": below}
    guidances = [
        Guidance(weight=0.0),
        *(Guidance(weights={name: 0.6}) for name in named),
        Guidance(weights={"brief": 1.2}, plausibility=0.1),
        Guidance(weights={"polite": 0.4, "whole": 0.3}, form="genarm"),
        Guidance(weights={"faithful": 0.8}, form="dpo"),
        Guidance(weights={"whole": 0.6}),
    ]
    requests = mixed_requests(2, guidances, long=24)
    expected = reference_engine(paths).generate(requests)
    own = {expected[2 * place + 1].token_ids for place in (1, 2, 3, len(guidances) - 1)}
    assert len(own) == 4, "the answers are too much alike"
    both = Guidance(weights={"faithful": 0.5, "brief": 0.5})
    with vllm_batch(paths, max_adapters=2) as batch:
        assert_same(expected, answers(batch, requests))
        with pytest.raises(TitaError, match="uses 2 adapters, and the engine has 1 per request"):
            answers(batch, mixed_requests(1, [both]))
        # Adapters that steer nothing are left out of an explanation.
        explained = dataclasses.replace(requests[0], explain=True)
        (alone,) = answers(batch, [explained])
        assert dict(alone.tokens[0].terms).keys() == {"base", "whole"}
        assert alone.token_ids == expected[0].token_ids
        # vLLM would end, and all answers with it.
        (Path(named["brief"]) / "adapter_model.safetensors").unlink()
        with pytest.raises(TitaError, match=r"cannot be read any more .*; restore its files"):
            answers(batch, mixed_requests(1, [Guidance(weights={"brief": 0.6})])[:1])
        assert_same(expected[:1], answers(batch, requests[:1]))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])
def test_family(name: str, tmp_path: Path) -> None:
    """The adapters belong to the base model itself, which stays as it is."""
    base = build(tmp_path / "base", getattr(families, name), seed=1, layers=2)
    language = {"exclude_modules": r".*(vision_tower|visual|multi_modal_projector).*"}
    named = adapters(
        base, tmp_path, {"faithful": language, "brief": {"target_modules": ["q_proj"]}}
    )
    paths = {"base": base, **named}
    guidances = [Guidance(weight=0.0), *(Guidance(weights={each: 0.6}) for each in named)]
    requests = mixed_requests(2, guidances, long=16)
    expected = reference_engine(paths).generate(requests)
    assert len({expected[2 * place + 1].token_ids for place in range(3)}) == 3
    with vllm_batch(paths, max_model_len=512) as batch:
        assert_same(expected, answers(batch, requests))


def test_adapters_that_vllm_cannot_apply(tmp_path: Path) -> None:
    base, below = (str(demo_model_path(role)) for role in ("base", "reward"))

    def start(found: dict[str, str]) -> None:
        start_vllm(load_outlines({"base": base, **found}), VllmOptions(processes=False))

    intern = build(tmp_path / "intern", families.internvl, seed=1, layers=1)
    whole = adapters(intern, tmp_path / "projector", {"whole": {}})
    with pytest.raises(TitaError, match=r"changes \S+projector\S+; .* to language_model only"):
        start_vllm(load_outlines({"base": intern, **whole}), VllmOptions(processes=False))
    of_tower = {"target_modules": r".*vision_tower.*q_proj", "exclude_modules": None}
    with pytest.raises(TitaError, match=r"changes model\.vision_tower.*language_model and multi_"):
        start(adapters(below, tmp_path / "tower", {"tower": of_tower}))
    wide = adapters(below, tmp_path / "wide", {"wide": {"r": 600}})
    with pytest.raises(TitaError, match="has rank 600, and vLLM at most 512"):
        start(wide)
    told = adapters(below, tmp_path / "told", {"told": {}})
    config = Path(told["told"]) / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 99}))
    with pytest.raises(TitaError, match=r"vLLM cannot apply the adapter .LoRA rank 99 is greater"):
        start(told)
    one = adapters(below, tmp_path / "one", {"one": {}})
    other = adapters(base, tmp_path / "other", {"other": {}})
    with pytest.raises(TitaError, match="reward model other is an adapter of another model"):
        start(one | other)
