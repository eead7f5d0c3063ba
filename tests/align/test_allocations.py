"""A decode step allocates no vocabulary-sized tensor beside the models' logits."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tita.align import Engine, Request, Sampling
from tita.align.prompts import Preparer
from tita.demo.tiny_llava import BASE, REWARD, make_model, make_processor
from tita.vlm.loading import VLM, Models

NUM_ROWS = 3
NUM_TOKENS = 5003  # like no other size in the models


class Large(TorchDispatchMode):
    """Counts operations that allocate a vocabulary-sized row or more."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in _tensors([args, kwargs])}
        for tensor in _tensors(result):
            is_new = tensor.untyped_storage().data_ptr() not in given
            if is_new and tensor.numel() >= NUM_TOKENS:
                self.made.append(str(func))
        return result


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for each in value for t in _tensors(each)] if isinstance(value, list | tuple) else []


@pytest.fixture(scope="module")
def models() -> Models:
    """Random models whose vocabulary is larger than any of their other dimensions."""
    processor = make_processor()
    made = []
    for name, size in (("base", BASE), ("reward", REWARD)):
        model = make_model(size, processor=processor, seed=0).eval()
        model.resize_token_embeddings(NUM_TOKENS)
        made.append(VLM(name=name, model=model, processor=processor, image_aspect="pad"))
    return Models(*made)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_step_allocates_one_batch_of_logits_per_model(models: Models, temperature: float) -> None:
    sampling = Sampling(max_new_tokens=8, ignore_end=True, temperature=temperature)
    batch, preparer = Engine(models).new_batch(), Preparer(models)
    for key in range(NUM_ROWS):
        batch.admit(key, preparer.prepare(Request(question="what " * (key + 1), sampling=sampling)))
    for _ in range(2):
        batch.step()
    with Large() as large:
        outcomes = batch.step()
    assert len(outcomes) == NUM_ROWS
    heads = [name for name in large.made if "linear" in name]
    assert len(heads) == 2
    assert large.made == heads
