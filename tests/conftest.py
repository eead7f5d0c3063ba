"""What all tests share: an environment without settings of the person who runs them."""

import os

import pytest

pytest_plugins = ["tests.s3_server"]

# One thread a process: several processes on few cores are slower by a factor with more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is ever downloaded from a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for name in [name for name in os.environ if name.startswith("TITA_") and "TEST" not in name]:
    del os.environ[name]


@pytest.fixture(autouse=True)
def fresh_settings() -> None:
    """Settings are read once a process; every test begins with its own environment."""
    from tita.settings import settings

    settings.cache_clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason, where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))
