"""The demo's models on the CPU, where the reference results are computed."""

import dataclasses
from typing import Literal

import pytest

from tests.align.definition import LENGTH, asked
from tita.align import Engine, Request, Sampling
from tita.demo.models import demo_model_path
from tita.vlm.loading import VLM, Models, load_vlm


def on_cpu(role: Literal["base", "reward"]) -> VLM:
    vlm = load_vlm(str(demo_model_path(role)))
    return dataclasses.replace(vlm, model=vlm.model.to("cpu"))


@pytest.fixture(scope="session")
def base() -> VLM:
    return on_cpu("base")


@pytest.fixture(scope="session")
def reward() -> VLM:
    return on_cpu("reward")


@pytest.fixture(scope="session")
def models(base: VLM, reward: VLM) -> Models:
    return Models(base, reward)


@pytest.fixture(scope="session")
def engine(base: VLM, reward: VLM) -> Engine:
    return Engine(Models(base, reward))


@pytest.fixture(scope="session")
def requests() -> list[Request]:
    """Requests with prompts of different lengths."""
    return asked(8, sampling=Sampling(max_new_tokens=LENGTH))


@pytest.fixture
def fresh_models() -> Models:
    """Models that a test may modify."""
    return Models(on_cpu("base"), on_cpu("reward"))
