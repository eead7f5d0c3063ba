"""Shared fixtures: an environment without the settings of the user who runs the tests."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest_plugins = ["tests.installed", "tests.s3_server"]

TESTS = Path(__file__).parent
HELM_CACHE = TESTS.parent / ".cache" / "helm"
# Fixtures and one test that render the chart.
NEED_HELM = {"chart", "rendered", "test_helm_commands_render"}

# Files that keep the processors busy for a minute or more, in the order in which they begin.
LONG = (
    "train/test_training.py",
    "train/test_validation.py",
    "train/test_nodes.py",
    "demo/test_demo.py",
    "test_extending.py",
    "launch/test_local.py",
    "train/test_trackers.py",
    "test_readme.py",
    "selftest/test_selftest.py",
    "train/test_stored_rows.py",
    "chart/test_policy.py",
)

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
    """Skip tests that this machine cannot run, with the reason, and spread the long files."""
    items[:] = _spread(items)
    if not _has_cuda(items):
        _skip(items, "needs a CUDA device", lambda item: _is_gpu(item))
    if not (os.environ.get("HELM_DIR") or shutil.which("npm") or any(HELM_CACHE.glob("*"))):
        reason = "needs helm: install npm, which provides it, or set HELM_DIR to helm's folder"
        _skip(items, reason, lambda item: bool(NEED_HELM & {*_fixtures(item), item.name}))


def _spread(items: list[pytest.Item]) -> list[pytest.Item]:
    """The tests with the long files evenly among the others, many of which wait for servers."""
    by_file: dict[Path, list[pytest.Item]] = {}
    for item in items:
        by_file.setdefault(item.path, []).append(item)
    names = [TESTS / name for name in LONG]
    if gone := [str(path) for path in names if not path.is_file()]:
        raise pytest.UsageError(f"tests/conftest.py lists files that are gone: {gone}")
    long = [by_file.pop(path) for path in names if path in by_file]
    others = list(by_file.values())
    every = len(others) / max(len(long), 1)
    for number, file in enumerate(long):
        others.insert(round(number * every) + number, file)
    return [item for file in others for item in file]


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
