"""`build-pairs` makes the same pairs with both engines, also about noisy images."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="engine vllm is not installed: run make test-vllm")

from tita.data import read_pairs
from tita.demo.models import demo_model_path
from tita.demo.scenes import make_scenes, write_scenes


def build(folder: Path, **recipe: Any) -> list[tuple[str, str, str]]:
    """Pairs of a run: id, chosen and rejected answer."""
    whole = {
        "model": str(demo_model_path("base")),
        "questions": str(folder / "scenes" / "train.jsonl"),
        "images": str(folder / "scenes"),
        "dtype": "float32",
        "max_new_tokens": 8,
        "batch_size": 15,
        # The noise is added after the processor, so the images have the same pixels until then.
        "noise": "seva",
        "diffusion_steps": 999,
        "temperature": 1.0,
        **recipe,
    }
    store = folder / whole.get("engine", "transformers")
    environment = os.environ | {
        "TITA_STORE": str(store),
        "TITA_RUN": "r",
        "TITA_RECIPE": json.dumps(whole),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # As torchrun sets them.
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tita.pairs"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    pairs = read_pairs(store / "pairs" / "r" / "pairs.jsonl")
    return [(pair.id, pair.chosen, pair.rejected) for pair in pairs]


def test_pairs_are_those_of_the_transformers_engine(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", make_scenes("train", number=10), name="train")
    expected = build(tmp_path)
    assert len(expected) > 8
    assert build(tmp_path, engine="vllm", vllm={"enforce_eager": True}) == expected
