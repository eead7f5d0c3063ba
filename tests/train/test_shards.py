"""Batches of images in shards equal those of files; test_training.py trains on shards."""

from pathlib import Path
from typing import Any

import torch

from tita.data import open_dataset
from tita.demo.models import demo_model_path
from tita.storage import open_store, resolve
from tita.train.collators import PairCollator
from tita.train.training_data import make_dataset
from tita.vlm.processors import load_processor


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
