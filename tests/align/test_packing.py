"""Packed models give the same answers, and their weights are restored bit for bit."""

import copy

import pytest
import torch

from tests.align.always import Always
from tita.align import Engine, EngineOptions, Guidance, Request, Sampling
from tita.errors import TitaError
from tita.vlm import packing
from tita.vlm.loading import VLM, Models
from tita.vlm.packing import PackedLinear, pack_linears, unpack_linears

ASKED = [
    Request(
        question=text,
        sampling=Sampling(max_new_tokens=16, ignore_end=True),
        guidance=Guidance(weight=0.4),
    )
    for text in ("what number ?", "is there a 7 ?")
]


def num_packed(vlm: VLM) -> int:
    return sum(isinstance(module, PackedLinear) for module in vlm.model.modules())


def test_answers_are_the_same(models: Models, fresh_models: Models) -> None:
    wanted = [Engine(models).generate([each])[0] for each in ASKED]
    packed = Engine(fresh_models, EngineOptions(pack=True))
    packed.draft_policy = Always(max_drafts=4)
    assert [packed.generate([each])[0] for each in ASKED] == wanted
    base = fresh_models.base.model
    assert not any(type(module) is torch.nn.Linear for module in base.model.modules())
    assert isinstance(base.lm_head, torch.nn.Linear)  # shared with the embedding


def test_weights_are_saved_copied_and_restored(fresh_models: Models) -> None:
    vlm = fresh_models.base
    before = {name: tensor.clone() for name, tensor in vlm.model.state_dict().items()}
    num_layers = pack_linears(vlm)
    assert num_layers == num_packed(vlm) > 0

    def check(model: torch.nn.Module) -> None:
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    check(vlm.model)
    check(copy.deepcopy(vlm.model))
    assert unpack_linears(vlm) == num_layers
    assert num_packed(vlm) == 0
    check(vlm.model)
    assert sum(p.numel() for p in vlm.model.parameters()) == vlm.model.num_parameters()


def test_large_models_are_packed_by_default(
    fresh_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    Engine(fresh_models)
    assert [num_packed(vlm) for vlm in fresh_models.by_role().values()] == [0, 0]
    size = sum(linear.weight.nbytes for _, _, linear in packing._packable(fresh_models.reward))
    monkeypatch.setattr(packing, "_CACHE_BYTES", size)
    Engine(fresh_models, EngineOptions(pack=False))
    assert [num_packed(vlm) for vlm in fresh_models.by_role().values()] == [0, 0]
    Engine(fresh_models)
    base, reward = map(num_packed, fresh_models.by_role().values())
    assert base > 0
    assert reward == 0


def test_other_dtypes_are_not_packed(fresh_models: Models) -> None:
    vlm = fresh_models.base
    vlm.model.to(torch.bfloat16)
    assert pack_linears(vlm) == 0


def test_moving_a_packed_model_unpacks_it(fresh_models: Models) -> None:
    vlm = fresh_models.base
    before = {name: tensor.clone() for name, tensor in vlm.model.state_dict().items()}
    num_layers = pack_linears(vlm)
    vlm.model.to("cpu").float()
    assert num_packed(vlm) == num_layers, "nothing moved"
    vlm.model.double()
    assert num_packed(vlm) == 0
    assert all(p.dtype is torch.float64 for p in vlm.model.parameters())
    vlm.model.float()
    after = vlm.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert pack_linears(vlm) == num_layers


def test_packed_models_cannot_be_trained(fresh_models: Models) -> None:
    vlm = fresh_models.base
    pack_linears(vlm)
    vlm.model.eval()
    with pytest.raises(TitaError, match=r"cannot be trained; call .*unpack_linears first"):
        vlm.model.train()
    unpack_linears(vlm)
    vlm.model.train()
    assert all(module.training for module in vlm.model.modules())
