"""Preloaded by the fork server of `tests.pairs.workers`: imports and a loaded model."""

import boto3  # noqa: F401

import tita.pairs.__main__  # noqa: F401
from tita.demo.models import demo_model_path
from tita.settings import settings
from tita.vlm.loading import load_vlm

load_vlm(str(demo_model_path("base")), dtype="float32")
settings.cache_clear()
