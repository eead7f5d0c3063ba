"""Pairs: every question once, whoever works on it and however often they are killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tita.data import read_pairs
from tita.demo.models import demo_model_path
from tita.demo.scenes import make_scenes, write_scenes
from tita.storage import Store, open_store
from tita.vlm import open_image

NUM_SCENES = 30


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = open_store(str(tmp_path / "store"))
    write_scenes(tmp_path / "data", make_scenes("train", number=NUM_SCENES), name="train")
    store.push_tree(tmp_path / "data", "data")
    return store


def worker(
    store: Store, *, run: str = "r", rank: int = 0, world_size: int = 1, **recipe: object
) -> "subprocess.Popen[str]":
    whole = {
        "model": str(demo_model_path("base")),
        "questions": "data/train.jsonl",
        "images": "data",
        "dtype": "float32",
        "max_new_tokens": 4,
        "batch_size": 8,
    } | recipe
    environment = os.environ | {
        "TITA_STORE": store.uri,
        "TITA_RUN": run,
        "TITA_RECIPE": json.dumps(whole),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tita.pairs"], env=environment, stderr=subprocess.PIPE, text=True
    )


def finish(process: "subprocess.Popen[str]") -> str:
    _, stderr = process.communicate(timeout=180)
    assert process.returncode == 0, stderr
    return stderr


def result(store: Store, run: str) -> bytes:
    return store.get(f"pairs/{run}/pairs.jsonl")


@pytest.mark.slow
def test_workers_killed_at_random_leave_every_pair_once(store: Store) -> None:
    finish(worker(store, run="undisturbed"))
    generator = random.Random(7)
    for _ in range(3):
        doomed = worker(store, run="killed")
        parts = generator.randint(1, 3)
        while doomed.poll() is None and len(list(store.list("parts/killed"))) < parts:
            time.sleep(0.01)
        doomed.send_signal(signal.SIGKILL)
        doomed.communicate()
    both = [worker(store, run="killed", rank=rank, world_size=2) for rank in (0, 1)]
    for process in both:
        finish(process)
    assert result(store, "killed") == result(store, "undisturbed")
    ids = [pair.id for pair in read_pairs(store.pull_tree("pairs/killed") / "pairs.jsonl")]
    assert len(ids) == len(set(ids)) > NUM_SCENES
    assert not list(store.list("parts/"))


@pytest.mark.slow
def test_lineage_and_contact_sheet_say_where_pairs_come_from(store: Store) -> None:
    words = finish(
        worker(store, distortions=["diffusion", "blur"], chosen="reference", max_questions=12)
    )
    tree = store.pull_tree("pairs/r")
    pairs = list(read_pairs(tree / "pairs.jsonl"))
    lineage = json.loads((tree / "lineage.json").read_text())
    dropped = lineage["num_dropped"]
    assert lineage["num_kept"] == len(pairs)
    assert lineage["num_kept"] + sum(dropped.values()) == 24
    assert f"{len(pairs)} pairs in pairs/r" in words
    assert len(lineage["model"]["digest"]) == 64
    truth = {
        row["question_id"]: row["answer"]
        for row in map(json.loads, store.get("data/train.jsonl").decode().splitlines())
    }
    assert all(pair.chosen == truth[pair.id.rpartition("/")[0]] for pair in pairs)
    sheet = (tree / "contact_sheet.html").read_text()
    assert sheet.count("<img") == len(pairs)
    for pair in pairs:
        open_image(store.pull_tree("data") / pair.image)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"questions": "data/none.jsonl"}, "neither a complete tree in the store"),
        ({"images": "data/ocrvqa"}, "no image 'texvqa/train_images/train-00001.png'"),
        ({"model": "./no-such-model"}, "no such file or folder"),
        ({"model": "data"}, "no config.json in it"),
        ({"distortions": ["melt"]}, "recipe of build-pairs: distortions"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    store: Store, recipe: dict[str, object], words: str
) -> None:
    process = worker(store, **recipe)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert words in stderr.strip().splitlines()[-1]
    assert "Traceback" not in stderr
    assert not list(store.list("pairs/"))
