"""Shared fixtures: an environment without the settings of the user who runs the tests."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest_plugins = ["tests.installed", "tests.s3_server"]

HELM_CACHE = Path(__file__).parent.parent / ".cache" / "helm"
# Fixtures and one test that render the chart.
NEED_HELM = {"chart", "rendered", "test_helm_commands_render"}

# One thread per process: with more, several processes on few cores are many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Never download from a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A shell makes its background jobs ignore SIGINT; processes that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
for name in [name for name in os.environ if name.startswith("TITA_") and "TEST" not in name]:
    del os.environ[name]


@pytest.fixture(autouse=True)
def fresh_settings() -> None:
    """Settings and credentials are cached per process; a test starts with its own environment."""
    from tita.settings import settings

    settings.cache_clear()
    if (boto3 := sys.modules.get("boto3")) is not None:
        boto3.DEFAULT_SESSION = None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that this machine cannot run, with the reason."""
    if not _has_cuda(items):
        _skip(items, "needs a CUDA device", lambda item: _is_gpu(item))
    if not (os.environ.get("HELM_DIR") or shutil.which("npm") or any(HELM_CACHE.glob("*"))):
        reason = "needs helm: install npm, which provides it, or set HELM_DIR to helm's folder"
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
