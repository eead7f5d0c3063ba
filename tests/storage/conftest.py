"""A store of each kind."""

import os
from pathlib import Path

import pytest

from tita.settings import settings
from tita.storage import Store, open_store


@pytest.fixture(params=["directory", "s3_environment"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store, in a directory and on the S3 server, which is also that of the settings."""
    if request.param == "directory":
        monkeypatch.setenv("TITA_STORE", str(tmp_path / "store"))
    else:
        request.getfixturevalue(request.param)
    settings.cache_clear()
    return open_store(os.environ["TITA_STORE"])
