"""Rewards as LoRA adapters on one model equal the models into which peft merges them."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters import merged, save_adapter
from tests.align.always import Always
from tests.align.definition import LENGTH, asked
from tests.families import FAMILIES, saved
from tita.align import Engine, EngineOptions, Guidance, Request, Sampling
from tita.demo.models import demo_model_path
from tita.errors import TitaError
from tita.storage.locate import digest_folder
from tita.vllm_plugin.outline import load_outline
from tita.vlm.adapters import read_adapter
from tita.vlm.loading import VLM, Models, adapter_digest, load_vlm, model_digest
from tita.vlm.model_set import digest_of, load_role
from tita.vlm.packing import unpack_linears

NAMES = ("faithful", "brief", "polite")
SAMPLING = Sampling(max_new_tokens=LENGTH, ignore_end=True)


def models_of(names: dict[str, str]) -> Models:
    """Models by role, as commands load them."""
    loaded: dict[str, VLM] = {}
    for role, where in names.items():
        loaded[role] = load_role(role, where, loaded=loaded, load=on_cpu)
    base, reference = loaded.pop("base"), loaded.pop("reference", None)
    return Models(base, None, reference, more=loaded)


def on_cpu(where: str) -> VLM:
    vlm = load_vlm(where)
    return dataclasses.replace(vlm, model=vlm.model.to("cpu"))


@pytest.fixture(
    scope="module",
    params=[
        "llava",
        "qwen2_5_vl",
        pytest.param("internvl", marks=pytest.mark.soak),
        pytest.param("idefics3", marks=pytest.mark.soak),
    ],
)
def places(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Folders of a base model, of the model below the adapters, and of three adapters."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llava":
        base, below = demo_model_path("base"), demo_model_path("reward")
    else:
        base = saved(FAMILIES[request.param], folder / "base", seed=1)
        below = saved(FAMILIES[request.param], folder / "below", seed=2)
    model = load_vlm(str(below)).model.to("cpu")
    kinds: list[dict[str, Any]] = [
        {},
        {"r": 8, "use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 2}},
    ]
    adapters = {
        name: save_adapter(model, folder / name, base=below, seed=seed, **kind)
        for seed, (name, kind) in enumerate(zip(NAMES, kinds, strict=True))
    }
    return {"base": base, "reference": below} | adapters


@pytest.fixture(scope="module")
def shared(places: dict) -> Models:
    return models_of({role: str(where) for role, where in places.items()})


@pytest.fixture(scope="module")
def apart(places: dict) -> Models:
    """The same models, none of which shares its weights."""
    below = on_cpu(str(places["reference"]))
    more = {name: merged(below, places[name]) for name in NAMES}
    return Models(on_cpu(str(places["base"])), None, below, more=more)


GUIDANCES = (
    Guidance(weights={"faithful": 0.6}),
    Guidance(weights={"brief": 0.8}),
    Guidance(weights={"faithful": 0.3, "brief": 0.4}),
    Guidance(weights={"polite": 0.7, "brief": 0.2}, form="genarm", plausibility=0.05),
    Guidance(weights={"polite": 0.5, "faithful": 0.4}, form="dpo"),
    Guidance(weight=0.0),
    Guidance(form="vcd", weight=1.0),
    Guidance(weights={"polite": 1.0}),
)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    dice = torch.Generator().manual_seed(0)
    pixels = torch.randint(255, (3, 40, 60, 3), dtype=torch.uint8, generator=dice).numpy()
    words = ("what number ?", "what is there in the image ?", "yes ?")
    return [
        Request(
            question=words[number % 3],
            images=() if number == 6 else (PIL.Image.fromarray(pixels[number % 3]),),
            guidance=guidance,
            sampling=SAMPLING,
            explain=number % 2 == 0,
        )
        for number, guidance in enumerate((*GUIDANCES, *GUIDANCES[:3]))
    ]


def check_equal(found: list, wanted: list) -> None:
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in wanted]
    for one, other in zip(found, wanted, strict=True):
        for token, its in zip(one.tokens, other.tokens, strict=True):
            assert token.combined == pytest.approx(its.combined, abs=1e-4)
            assert dict(token.terms) == pytest.approx(dict(its.terms), abs=1e-4)


def test_adapters_equal_merged_models(
    shared: Models, apart: Models, requests: list[Request]
) -> None:
    """In one batch, in chunks with kept images, alone, and with drafts; weights and scores."""
    wanted = Engine(apart).generate(requests)
    assert len({answer.token_ids for answer in wanted}) > 4
    assert len({id(vlm.model) for vlm in shared.by_role().values()}) == 2
    for options in (EngineOptions(), EngineOptions(prefill_tokens=4, prefix_cache_bytes=2**20)):
        engine = Engine(shared, options)
        check_equal(engine.generate(requests), wanted)
    check_equal(engine.generate(requests), wanted)
    batch = engine.new_batch()
    assert list(batch.runners) == ["base", "faithful"]
    engine.draft_policy = Always(max_drafts=3)
    check_equal([engine.generate([request])[0] for request in requests], wanted)
    assert engine.draft_policy.num_drafted > 0


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The demo's base, and a hundred adapters for it: a few different ones under many names."""
    folder, base = tmp_path_factory.mktemp("many"), demo_model_path("base")
    model = load_vlm(str(base)).model.to("cpu")
    kinds = [save_adapter(model, folder / str(n), base=base, seed=n) for n in range(5)]
    return {"base": str(base)} | {f"r{n}": str(kinds[n % 5]) for n in range(100)}


def test_a_hundred_adapters_within_a_memory_limit(many: dict[str, str]) -> None:
    """They share the weights of the base model itself; four are in memory at most."""
    models = models_of(many)
    assert len({id(vlm.model) for vlm in models.by_role().values()}) == 1
    pool = models.base.adapters
    assert pool is not None
    engine = Engine(models, EngineOptions(max_adapters=4))
    questions = asked(8, sampling=Sampling(max_new_tokens=3))[:8]
    requests = [
        dataclasses.replace(questions[n % 8], guidance=Guidance(weights={f"r{n}": 0.5}))
        for n in range(100)
    ]
    found: dict[int, Any] = dict(engine.generate_as_completed(iter(requests), batch_size=16))
    assert pool.num_loads == 100
    assert len(pool.loaded) == 4
    num_bytes = pool.num_bytes
    # Those of equal weights have equal answers, in whatever company they were generated.
    for number in range(40):
        assert found[number].token_ids == found[number + 40].token_ids
    again = engine.generate([requests[int(pool.loaded[-1][1:])], requests[0], requests[1]])
    assert pool.num_loads == 102, "the newest was still there"
    assert [each.token_ids for each in again[1:]] == [found[0].token_ids, found[1].token_ids]
    assert pool.num_bytes == num_bytes
    two = Engine(models, EngineOptions(max_adapters=8))
    both = dataclasses.replace(
        questions[0], guidance=Guidance(weights={f"r{n}": 0.1 for n in range(9)})
    )
    assert two.generate([dataclasses.replace(both, guidance=GUIDANCES[5])])[0].tokens == ()
    # Adapters that steer nothing are explained only if there is room for all of them.
    steered = dict.fromkeys((f"r{n}" for n in range(9)), 0.0) | {"r0": 0.5}
    for guidance, sources in (
        (GUIDANCES[5], {"base"}),
        (Guidance(weights=steered), {"base", "r0"}),
    ):
        explained = dataclasses.replace(both, guidance=guidance, explain=True)
        assert dict(two.generate([explained])[0].tokens[0].terms).keys() == sources
    with pytest.raises(TitaError, match=r"uses 9 adapters, more than may be in memory; give fewer"):
        two.generate([both])
    eight = Guidance(weights={f"r{n}": 0.1 for n in range(8)})
    assert two.generate([dataclasses.replace(both, guidance=eight), *requests[8:12]])
    assert len(pool.loaded) == 8
    assert pool.num_bytes == 2 * num_bytes


def test_a_request_that_waits_for_a_place_is_not_overtaken(many: dict[str, str]) -> None:
    models = models_of({role: many[role] for role in ("base", "r0", "r1", "r2", "r3", "r4")})
    engine = Engine(models, EngineOptions(max_adapters=2))
    batch = engine.new_batch()
    (question,) = asked(1, sampling=Sampling(max_new_tokens=9, ignore_end=True))[:1]
    weights = ({"r0": 0.5}, {"r1": 0.5}, {"r2": 0.2, "r3": 0.2}, {"r0": 0.1}, {})
    ended = list[Any]()

    def admit(*numbers: int) -> None:
        for number in numbers:
            guidance = Guidance(weights=weights[number], weight=0.0)
            request = dataclasses.replace(question, guidance=guidance)
            batch.admit(number, engine.preparer.prepare(request))

    def step() -> None:
        ended.extend(key for key, each in batch.step() if each.finish_reason is not None)  # type: ignore[union-attr]

    admit(0, 1)
    while len(batch.runners["base"].keys) < 4:
        step()
    # The fourth request would fit, and waits behind the third; the base alone needs no place.
    admit(2, 3, 4)
    while len(batch):
        step()
    assert sorted(ended) == [0, 1, 2, 3, 4]
    assert ended.index(1) < ended.index(2) < ended.index(3)
    assert ended.index(4) < ended.index(2)


def test_adapters_on_the_base_model(many: dict[str, str]) -> None:
    """Rewards and base in one forward: each is charged its share of the time. The base may be an
    adapter, too."""
    questions = asked(2, sampling=Sampling(max_new_tokens=3, ignore_end=True))[:3]
    plain = on_cpu(many["base"])
    own, other = (merged(plain, Path(many[name])) for name in ("r1", "r2"))
    requests = [
        dataclasses.replace(each, guidance=Guidance(weights={"r2": weight}))
        for each, weight in zip(questions, (0.7, 0.0, 0.4), strict=True)
    ]
    for base, name in ((plain, "base"), (own, "r1")):
        models = models_of({"base": many[name], "r2": many["r2"]})
        engine = Engine(models)
        wanted = Engine(Models(base, more={"r2": other})).generate(requests)
        assert [each.token_ids for each in engine.generate(requests)] == [
            each.token_ids for each in wanted
        ]
        outputs = [output for _, output in engine.stream(requests)]
        assert not any(isinstance(each, TitaError) for each in outputs)
        assert sum(each.reward_s for each in outputs) > 0  # type: ignore[union-attr]
    assert list(engine.new_batch().runners) == ["base"]


def test_the_digest_of_an_adapter_covers_its_model(
    shared: Models, places: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model below the adapters, which may have many gigabytes, is read once."""
    read = list[Path]()

    def counted(folder: Path) -> str:
        read.append(folder)
        return digest_folder(folder)

    monkeypatch.setattr("tita.vlm.loading.digest_folder", counted)
    digests = {model_digest(vlm) for vlm in shared.by_role().values()}
    assert len(digests) == len(read) == 5
    assert model_digest(shared.reference) == model_digest(on_cpu(str(places["reference"])))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "has use_dora=True, and only plain LoRA is read; merge it"),
        ({"peft_type": "IA3"}, "not a LoRA adapter .type IA3.; merge it"),
        ({"alpha_pattern": {"q_proj": 3}}, "has alpha_pattern="),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights=pissa"),
        ({"base_model_name_or_path": ""}, "its base_model_name_or_path is missing"),
        (
            {"base_model_name_or_path": "models/gone"},
            "of the adapter, models/gone: .*; bring that",
        ),
    ],
)
def test_other_adapters_are_refused(
    many: dict[str, str], tmp_path: Path, fields: dict, message: str
) -> None:
    whole = Path(many["r0"])
    config = json.loads((whole / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | fields))
    (tmp_path / "adapter_model.safetensors").symlink_to(whole / "adapter_model.safetensors")
    with pytest.raises(TitaError, match=message):
        models_of({"base": many["base"], "bad": str(tmp_path)})


def test_an_adapter_of_another_model_is_refused(many: dict[str, str], tmp_path: Path) -> None:
    config = json.loads((Path(many["r0"]) / "adapter_config.json").read_text())
    other = {"base_model_name_or_path": str(demo_model_path("reward"))}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | other))
    weights = tmp_path / "adapter_model.safetensors"
    weights.symlink_to(Path(many["r0"]) / "adapter_model.safetensors")
    with pytest.raises(TitaError, match=r"the adapter changes model\S+, \d+ to .*; check that"):
        models_of({"base": many["base"], "bad": str(tmp_path)})
    with pytest.raises(TitaError, match=r"the adapter changes model\S+, \d+ to .*; check that"):
        load_role("bad", str(tmp_path), loaded={}, load=load_outline)
    weights.unlink()
    weights.write_bytes(b"\x99" * 40)
    with pytest.raises(TitaError, match=r"not an adapter .*; give a folder with adapter_config"):
        read_adapter(tmp_path)
    for load in (load_vlm, load_outline):  # the latter for vLLM
        with pytest.raises(TitaError, match="a LoRA adapter, and a whole model is needed here; na"):
            load(str(tmp_path))


def test_files_that_vanish_fail_their_requests_alone(many: dict[str, str], tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((Path(many["r1"]) / name).read_bytes())
    models = models_of({"base": many["base"], "here": many["r0"], "gone": str(tmp_path)})
    (tmp_path / "adapter_model.safetensors").unlink()
    questions = asked(2, sampling=Sampling(max_new_tokens=3, ignore_end=True))[:3]
    requests = [
        dataclasses.replace(each, guidance=Guidance(weights={name: 0.5}))
        for each, name in zip(questions, ("here", "gone", "here"), strict=True)
    ]
    found = Engine(models).generate(requests, return_errors=True)
    assert isinstance(found[1], TitaError)
    assert "the adapter cannot be read any more" in str(found[1])
    assert [len(found[n].token_ids) for n in (0, 2)] == [3, 3]  # type: ignore[union-attr]


def test_an_adapter_that_is_replaced_is_not_used_under_its_old_digest(
    many: dict[str, str], tmp_path: Path
) -> None:
    """Its weights are read when a request uses it, perhaps hours after its digest was computed."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    for name in names:
        (tmp_path / name).write_bytes((Path(many["r1"]) / name).read_bytes())
    models = models_of({"base": many["base"], "here": many["r0"], "new": str(tmp_path)})
    pool = models.rewards["new"].adapters
    assert pool is not None
    with pool.selected(["new"]):
        pass
    # In memory it is the one that the digest names.
    weights = tmp_path / names[1]
    weights.write_bytes((Path(many["r2"]) / names[1]).read_bytes())
    os.utime(weights, ns=(0, 0))
    with pool.selected(["new"]):
        pass
    pool.clear()
    with (
        pytest.raises(
            TitaError, match=r"cannot be read any more \(\S+\.safetensors was replaced\)"
        ),
        pool.selected(["new"]),
    ):
        pass
    with pool.selected(["here"]):
        pass


def test_an_adapter_of_another_revision_of_a_hub_model_is_refused(
    many: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = {"main": "a" * 40, "trained": "b" * 40}
    hub = tmp_path / "hub" / "models--a--model"
    (hub / "refs").mkdir(parents=True)
    for name, commit in commits.items():
        (hub / "refs" / name).write_text(commit)
        shutil.copytree(many["base"], hub / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub.parent))
    folder = tmp_path / "adapter"
    shutil.copytree(many["r0"], folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": "a/model"}
    for revision, is_default in (
        (None, True),
        ("main", True),
        ("a" * 40, True),
        ("trained", False),
    ):
        path.write_text(json.dumps(config | {"revision": revision}))
        if is_default:
            assert model_digest(on_cpu("a/model")) == digest_of("a/model") == f"a/model@{'a' * 40}"
            assert load_role("r", str(folder), loaded={}, load=on_cpu).adapter == "r"
            assert digest_of(str(folder)) == adapter_digest(str(folder), f"a/model@{'a' * 40}")
            continue
        for use in (digest_of, lambda where: load_role("r", where, loaded={}, load=on_cpu)):
            with pytest.raises(
                TitaError, match=r"on revision trained of a/model, and .* a{12}; download"
            ):
                use(str(folder))


def test_weights_that_are_no_numbers_fail_their_requests_alone(
    many: dict[str, str], tmp_path: Path
) -> None:
    """Of a training run that diverged: in one forward with them, all rows would be NaN."""
    config, weights = "adapter_config.json", "adapter_model.safetensors"
    (tmp_path / config).write_bytes((Path(many["r1"]) / config).read_bytes())
    tensors = load_file(Path(many["r1"]) / weights)
    tensors[max(tensors)][0, 0] = torch.nan
    save_file(tensors, tmp_path / weights)
    models = models_of({"base": many["base"], "good": many["r0"], "bad": str(tmp_path)})
    questions = asked(2, sampling=Sampling(max_new_tokens=3, ignore_end=True))[:3]
    requests = [
        dataclasses.replace(each, guidance=guidance)
        for each, guidance in zip(
            questions,
            (Guidance(weights={"good": 0.5}), Guidance(weights={"bad": 0.5}), Guidance(weight=0)),
            strict=True,
        )
    ]
    engine = Engine(models)
    found = engine.generate(requests, return_errors=True)
    assert isinstance(found[1], TitaError)
    assert re.search(r"weights of model\S+ are NaN or infinite; train it again", str(found[1]))
    assert [found[n] for n in (0, 2)] == engine.generate([requests[0], requests[2]])


def test_models_may_be_packed_after_their_adapters_were_used(many: dict[str, str]) -> None:
    models = models_of({role: many[role] for role in ("base", "r0")})
    (question,) = asked(1, sampling=Sampling(max_new_tokens=6, ignore_end=True))[:1]
    alone, steered = (
        dataclasses.replace(question, guidance=Guidance(weights={"r0": weight}))
        for weight in (0.0, 1.0)
    )
    plain = Engine(models, EngineOptions(pack=False)).generate([steered, alone])
    assert plain[0].token_ids != plain[1].token_ids
    assert Engine(models, EngineOptions(pack=True)).generate([steered, alone]) == plain
    unpack_linears(models.base)
    assert Engine(models, EngineOptions(pack=False)).generate([steered, alone]) == plain
