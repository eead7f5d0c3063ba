"""vLLM's model runner V2: its answers equal those of the transformers engine, token for token.

On a CPU its Triton kernels are interpreted, so there are few requests.
"""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

if "vllm" in sys.modules:
    pytest.skip("vLLM was imported without Triton: run this file alone", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("runner V2 needs Triton: pip install triton==3.7.1", allow_module_level=True)
from tests.vllm import interpreted_triton  # noqa: F401

pytest.importorskip("vllm", reason="engine vllm is not installed: run make test-vllm")

from vllm import SamplingParams

from tests import families
from tests.adapters import save_adapter
from tests.vllm.engines import (
    GUIDANCES,
    Case,
    answers,
    assert_same,
    demo_case,
    mixed_requests,
    reference_engine,
    vllm_batch,
)
from tests.vllm.pairs import random_pair
from tests.vllm.test_families import build, family_pair
from tita.align import Guidance, Sampling
from tita.engine.engine_options import VllmOptions
from tita.engine.vllm_batch import VllmBatch
from tita.engine.vllm_engine import load_outlines, set_up
from tita.vllm_plugin import guided_models
from tita.vllm_plugin.families import guided_name
from tita.vllm_plugin.logits_processors import RequestCheck
from tita.vlm.loading import load_vlm


@pytest.fixture(autouse=True)
def runner_v2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")


@pytest.fixture(scope="module")
def random_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Random models, requests, and the transformers engine's answers."""
    paths = random_pair(tmp_path_factory.mktemp("random"))
    sampled = Sampling(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=2**70)
    requests = mixed_requests(1, long=20)
    requests += [dataclasses.replace(each, sampling=sampled) for each in requests[:6]]
    expected = reference_engine(paths).generate(requests)
    assert len({answer.text for answer in expected}) > 8, "the answers are too much alike"
    return paths, requests, expected


def uses_v2(batch: VllmBatch) -> bool:
    return bool(batch._engine.vllm_config.use_v2_model_runner)


def test_demo_pair_with_every_form() -> None:
    """Weights, forms and bounds mixed in one batch."""
    guidances = (*GUIDANCES, Guidance(weight=0.7, form="dpo"))
    paths, requests, expected = demo_case(1, guidances, long=16)
    with vllm_batch(paths) as batch:
        assert uses_v2(batch)
        assert_same(expected, answers(batch, requests))


def test_chunked_prefill(random_case: Case) -> None:
    """A chunk is shorter than an image; rows of requests in prefill are of no request."""
    paths, requests, expected = random_case
    with vllm_batch(paths, prefill_tokens=24, prefix_cache=False) as batch:
        assert_same(expected, answers(batch, requests))


def test_preemption(random_case: Case) -> None:
    """Evicted requests come back with their answers so far as part of what is prefilled."""
    paths, requests, _ = random_case
    sampling = Sampling(max_new_tokens=40, ignore_end=True)
    asked = [dataclasses.replace(each, sampling=sampling) for each in requests[:24:3]]
    expected = reference_engine(paths).generate(asked)
    with vllm_batch(
        paths, kv_cache_bytes=3 * 2**20, block_size=32, prefill_tokens=48, prefix_cache=False
    ) as batch:
        assert_same(expected, answers(batch, asked))
        assert batch.counts().num_preemptions > 0


def test_explained_answers(random_case: Case) -> None:
    paths, requests, _ = random_case
    asked = [dataclasses.replace(request, explain=True) for request in requests[:12:2]]
    expected = reference_engine(paths).generate(asked)
    with vllm_batch(paths) as batch:
        found = answers(batch, asked)
    for one, other in zip(expected, found, strict=True):
        assert one.token_ids == other.token_ids
        for token, same in zip(one.tokens, other.tokens, strict=True):
            assert (token.id, token.text, token.changed) == (same.id, same.text, same.changed)
            for name in ("base", "reward", "combined"):
                assert getattr(token, name) == pytest.approx(getattr(same, name), abs=2e-3)


def test_adapters_and_mrope(tmp_path: Path) -> None:
    """Adapters of the base model, whose positions have several dimensions."""
    base = build(tmp_path / "base", families.qwen2_5_vl, seed=1, layers=2)
    model = load_vlm(base).model
    language = {"exclude_modules": r".*(vision_tower|visual|multi_modal_projector).*"}
    kinds = {"faithful": language, "brief": {"target_modules": ["q_proj"]}}
    named = {
        name: str(save_adapter(model, tmp_path / name, base=base, seed=seed, **kind))
        for seed, (name, kind) in enumerate(kinds.items())
    }
    guidances = [Guidance(weight=0.0), *(Guidance(weights={each: 0.6}) for each in named)]
    requests = mixed_requests(1, guidances, long=12)
    paths = {"base": base, **named}
    expected = reference_engine(paths).generate(requests)
    assert len({expected[2 * place + 1].token_ids for place in range(3)}) == 3
    with vllm_batch(paths, max_model_len=512) as batch:
        assert uses_v2(batch)
        assert_same(expected, answers(batch, requests))


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl", "internvl"])
def test_family(name: str, tmp_path: Path) -> None:
    paths = family_pair(tmp_path, name)
    requests = mixed_requests(1, [Guidance(weight=0.0), Guidance(weight=0.6)], long=12)
    requests += [dataclasses.replace(each, images=()) for each in requests[::4]]
    expected = reference_engine(paths).generate(requests)
    with vllm_batch(paths, max_model_len=512) as batch:
        assert_same(expected, answers(batch, requests))


def test_drafts_are_refused(random_case: Case) -> None:
    setup = set_up(load_outlines(random_case[0]), VllmOptions(processes=False, compile=False))
    drafting = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    args = dataclasses.replace(setup.args, speculative_config=drafting)
    combined = getattr(guided_models, guided_name(setup.family))
    with pytest.raises(ValueError, match="only the reward model drafts"):
        combined(vllm_config=args.create_engine_config())


def test_log_probabilities_of_prompts_are_refused() -> None:
    for asked in ({"prompt_logprobs": 1}, {"prompt_logprob_token_ids": [[5]]}):
        with pytest.raises(ValueError, match="prompt_logprobs are not available"):
            RequestCheck.validate_params(SamplingParams(**asked))
