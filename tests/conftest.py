"""What all tests share: an environment without settings of the person who runs them."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

pytest_plugins = ["tests.s3_server"]

HELM_CACHE = Path(__file__).parent.parent / ".cache" / "helm"
# Fixtures that render the chart, and the one test that does so by itself.
NEED_HELM = {"chart", "rendered", "test_the_helm_commands_render"}

# One thread a process: several processes on few cores are slower by a factor with more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is ever downloaded from a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A shell has what it runs in the background ignore Ctrl-C, and so would whatever tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
for name in [name for name in os.environ if name.startswith("TITA_") and "TEST" not in name]:
    del os.environ[name]


@pytest.fixture(autouse=True)
def fresh_settings() -> None:
    """Settings are read once a process; every test begins with its own environment."""
    from tita.settings import settings

    settings.cache_clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine lacks the means for."""
    if not _has_cuda(items):
        _skip(items, "needs a CUDA device; this machine has none", lambda item: _is_gpu(item))
    if not (os.environ.get("HELM_DIR") or shutil.which("npm") or any(HELM_CACHE.glob("*"))):
        reason = "needs helm, which comes by npm: install npm or name helm's folder in HELM_DIR"
        _skip(items, reason, lambda item: bool(NEED_HELM & {*_fixtures(item), item.name}))


def _has_cuda(items: list[pytest.Item]) -> bool:
    if not any(map(_is_gpu, items)):
        return True
    import torch

    return torch.cuda.is_available()


def _is_gpu(item: pytest.Item) -> bool:
    return item.get_closest_marker("gpu") is not None


def _fixtures(item: pytest.Item) -> list[str]:
    return list(getattr(item, "fixturenames", ()))


def _skip(items: list[pytest.Item], reason: str, wanted: Callable[[pytest.Item], bool]) -> None:
    for item in filter(wanted, items):
        item.add_marker(pytest.mark.skip(reason=reason))
