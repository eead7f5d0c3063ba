"""A shared server for the tests that do not change its state."""

import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

# Test files are imported without a package, so their helpers must be on the path.
sys.path.insert(0, str(Path(__file__).parent))

from serve_process import ENGINE, Server, serving

from tita.demo.models import demo_model_path
from tita.serve.model_loading import LoadedModels, load_models
from tita.serve.serve_options import LoadOptions


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Over another engine, run the tests that share the server: each start takes a minute."""
    if ENGINE == "transformers":
        return
    shared = [each for each in items if "server" in getattr(each, "fixturenames", ())]
    config.hook.pytest_deselected(items=[each for each in items if each not in shared])
    items[:] = shared


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A ready server process, shared by tests that do not change its state."""
    # With the base model as the reference, form dpo must give the same answers as form tita.
    with serving("--reference", str(demo_model_path("base"))) as running:
        yield running.ready()


@pytest.fixture(scope="session")
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="session")
def models() -> LoadedModels:
    """The models of the `server` fixture, in this process."""
    base, reward = (str(demo_model_path(role)) for role in ("base", "reward"))
    return load_models(LoadOptions(base=base, reward=reward, reference=base))
