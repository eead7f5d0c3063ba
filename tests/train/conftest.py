"""A small training job as in a pod: real processes, the shipped tiny model, a directory store."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.once import made_once
from tita.demo.models import demo_model_path
from tita.demo.scenes import make_scenes, write_scenes
from tita.storage import open_store
from tita.storage.sharded_push import push_in_shards

RECIPE = {
    "model": str(demo_model_path("reward")),
    "dtype": "float32",
    "gradient_checkpointing": False,
    "freeze_vision": False,
    "batch_size": 4,
    "learning_rate": 1e-4,
    "logging_steps": 1,
    "save_steps": 2,
    "max_length": 64,
}


# As `tita train-dpo`, with `worker.py` as the worker.
WITH_TEST_WORKER = """
import sys
from tita.gang import run_workers
from tita.settings import settings
sys.exit(run_workers("worker", settings=settings()))
"""


@dataclass(frozen=True)
class Data:
    """Pairs and their images."""

    pairs: Path
    images: Path


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """48 pairs: 6 steps of 2 processes."""
    root = tmp_path_factory.mktemp("data")
    questions = write_scenes(root / "images", make_scenes("train", number=16), name="train")
    with (root / "pairs.jsonl").open("w") as file:
        for question in questions:
            chosen = question.references[0]
            row = {
                "id": question.id,
                "image_id": question.image,
                "question": question.text,
                "chosen": chosen,
                "reject": "no" if chosen != "no" else "yes",
            }
            file.write(json.dumps(row) + "\n")
    return Data(pairs=root / "pairs.jsonl", images=root / "images")


def given_path() -> list[str]:
    """The folders of modules that the tests were started with."""
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


@dataclass(frozen=True)
class Ended:
    """Exit code and output of a run."""

    code: int
    text: str


@dataclass(frozen=True)
class Job:
    """A running job."""

    process: subprocess.Popen[str]

    def finish(self) -> Ended:
        """Wait until it ends."""
        text, _ = self.process.communicate(timeout=200)
        return Ended(self.process.returncode, text)

    def run_until(self, step: int) -> None:
        """Read its output until it reports `step`."""
        self.run_until_said(f'"step": {step},')

    def run_until_said(self, words: str) -> None:
        """Read its output until a line contains `words`."""
        said = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said += line
            if words in line:
                return
        raise AssertionError(f"ended before it said {words!r}: {said}")

    def workers(self) -> list[int]:
        """Process ids of its workers."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        found = [int(child) for child in children]
        modules = (b"-m\0tita.gang.worker\0tita.train\0", b"-m\0tita.gang.worker\0worker\0")
        lines = {p: Path(f"/proc/{p}/cmdline").read_bytes() for p in found}
        return [p for p, line in lines.items() if any(module in line for module in modules)]


Start = Callable[..., Job]


@pytest.fixture(scope="session")
def start(data: Data) -> Iterator[Start]:
    """Starts `tita train-dpo` with two workers; kills what still runs at the end."""
    started: list[subprocess.Popen[str]] = []

    def begin(
        store: Path | str,
        *,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        procs: int = 2,
        **changes: Any,
    ) -> Job:
        test_worker = {"SAID", "FAULT"} & set(env or {})
        inputs = {"pairs": str(data.pairs), "images": str(data.images)}
        own = {
            "TITA_STORE": str(store),
            "TITA_RUN": "a",
            "TITA_RECIPE": json.dumps(RECIPE | inputs | changes),
            "TITA_PROCS_PER_NODE": str(procs),
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *given_path()]),
        }
        process = subprocess.Popen(
            [
                *prefix,
                sys.executable,
                *(("-c", WITH_TEST_WORKER) if test_worker else ("-m", "tita", "train-dpo")),
            ],
            env={**os.environ, **own, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return Job(process)

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()


@pytest.fixture(scope="session")
def undisturbed(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store after an undisturbed run."""

    def run(store: Path) -> None:
        ended = start(store).finish()
        assert ended.code == 0, ended.text

    return made_once(tmp_path_factory, "undisturbed", run)


@pytest.fixture
def sharded(data: Data, tmp_path: Path) -> Path:
    """A store with the images as a tree of several shards."""
    store = tmp_path / "store"
    push_in_shards(open_store(str(store)), data.images, "images", shard_bytes=10_000)
    assert len(list((store / "images" / "shards").glob("*.tar"))) > 2
    assert not list((store / "images").rglob("*.png"))
    return store


@pytest.fixture
def lone_rank(tmp_path: Path) -> Iterator[None]:
    """A process group with this process only."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
