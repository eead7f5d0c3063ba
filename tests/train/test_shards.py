"""Training on images in shards equals training on files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.comparing import largest_difference
from tita.data import open_dataset
from tita.demo.models import demo_model_path
from tita.storage import open_store, resolve
from tita.storage.sharded_push import push_in_shards
from tita.train.collators import PairCollator
from tita.train.training_data import make_dataset
from tita.vlm.processors import load_processor

Start = Callable[..., Any]


@pytest.fixture
def sharded(data: Any, tmp_path: Path) -> Path:
    """A store with the images as a tree of several shards."""
    store = tmp_path / "store"
    push_in_shards(open_store(str(store)), data.images, "images", shard_bytes=10_000)
    assert len(list((store / "images" / "shards").glob("*.tar"))) > 2
    assert not list((store / "images").rglob("*.png"))
    return store


def test_batches_are_the_same(data: Any, sharded: Path) -> None:
    model = str(demo_model_path("reward"))
    processor = load_processor(model, where=model)
    collator = PairCollator(processor)
    batches = []
    for images in (data.images, resolve("images", store=open_store(str(sharded)))):
        source = open_dataset(data.pairs, images=images)
        pairs = tuple(source.pairs())
        rows = make_dataset(pairs, images=source.images, processor=processor, image_aspect="pad")
        batches.append(collator([rows[number] for number in (5, 40, 17, 3)]))
    files, shards = batches
    assert files.keys() == shards.keys()
    for name, tensor in files.items():
        assert torch.equal(tensor, shards[name]), name


@pytest.mark.slow
def test_weights_are_the_same(start: Start, undisturbed: Path, sharded: Path) -> None:
    ended = start(sharded, images="images").finish()
    assert ended.code == 0, ended.text
    assert largest_difference(undisturbed / "runs/a/model", sharded / "runs/a/model") < 1e-6
    runs = [json.loads((store / "runs/a/run.json").read_text()) for store in (undisturbed, sharded)]
    assert runs[0]["images"]["digest"] == runs[1]["images"]["digest"]
