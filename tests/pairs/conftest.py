"""A store with the scenes of the demo, and a judge behind HTTP."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.pairs import judge_server
from tita.demo.scenes import make_scenes, write_scenes
from tita.settings import settings
from tita.storage import Store, open_store

NUM_SCENES = 10


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, make_scenes("train", number=NUM_SCENES), name="train")
    return folder


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of this process and its workers, with a directory as the store."""
    monkeypatch.setenv("TITA_STORE", str(tmp_path / "store"))
    return dict(os.environ)


@pytest.fixture
def store(environment: dict[str, str], scenes: Path) -> Store:
    """The store with the scenes as its tree `data`."""
    settings.cache_clear()
    store = open_store()
    store.push_tree(scenes, "data")
    return store


KEY = "secret-of-the-judge"


@dataclass(frozen=True)
class JudgeProcess:
    url: str
    log: Path

    @property
    def requests(self) -> list[dict[str, Any]]:
        text = self.log.read_text() if self.log.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def fail(self, status: int | None) -> None:
        """Answer every request with this status from now on."""
        file = Path(f"{self.log}.status")
        file.unlink(missing_ok=True) if status is None else file.write_text(str(status))

    def serve(self, digest: str) -> None:
        """Name this as the model's digest from now on."""
        Path(f"{self.log}.digest").write_text(digest)

    @property
    def recipe(self) -> dict[str, Any]:
        endpoint = {"base_url": self.url, "model": "j", "key_env": "JUDGE_KEY", "retries": 0}
        return {"strategy": "judge", "temperature": 2.0, "samples": 5, "endpoint": endpoint}


@pytest.fixture
def judge(tmp_path: Path, environment: dict[str, str]) -> Iterator[JudgeProcess]:
    environment["JUDGE_KEY"] = KEY
    log = tmp_path / "judge.jsonl"
    command = [sys.executable, judge_server.__file__, str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield JudgeProcess(f"http://127.0.0.1:{process.stdout.readline().strip()}/v1", log)
        process.terminate()
