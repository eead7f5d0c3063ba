"""A server for the tests that ask only what leaves it as it was."""

import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

# Tests are imported one by one, without packages: this makes `serve_process` one module for all.
sys.path.insert(0, str(Path(__file__).parent))

from serve_process import Server, serving

from tita.demo.models import demo_model_path
from tita.serve.loading import LoadedModels, LoadOptions


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server that is asked only what leaves it as it was."""
    # The base itself as the reference: form dpo must then say what form tita says.
    with serving("--reference", str(demo_model_path("base"))) as running:
        yield running.ready()


@pytest.fixture(scope="session")
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="session")
def models() -> LoadedModels:
    """The models that the server has, in this process."""
    base, reward = (str(demo_model_path(role)) for role in ("base", "reward"))
    return LoadOptions(base=base, reward=reward, reference=base).load()
