"""Scenes with their questions, and the options that name both models."""

from pathlib import Path

import pytest

from tita.demo.models import demo_model_path
from tita.demo.scenes import make_scenes, write_scenes
from tita.records import Question


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Question]]:
    """The folder of the images, and questions about them."""
    root = tmp_path_factory.mktemp("scenes")
    return root, write_scenes(root, make_scenes("test", number=4), name="test")


@pytest.fixture(scope="session")
def models() -> list[str]:
    base, reward = (str(demo_model_path(role)) for role in ("base", "reward"))
    return ["--base", base, "--reward", reward]
