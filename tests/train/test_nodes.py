"""Two nodes: two agents in networks of their own, every DeepSpeed stage, full and LoRA."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.comparing import largest_difference
from tests.train.network import two_hosts
from tests.train.worker import first_batch
from tita.data import read_pairs
from tita.demo.models import demo_model_path
from tita.train.collate import PairCollator
from tita.train.dataset import make_dataset
from tita.vlm import load_vlm

Start = Callable[..., Any]
MODEL = "runs/a/model"
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0}

pytestmark = [pytest.mark.slow]


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        # The warm-up is trained, saved and loaded by another trainer of the same processes.
        pytest.param("zero3", {"lora": LORA, "sft": {"steps": 2}}, id="zero3-lora-warm-up"),
        pytest.param("zero3_offload", {}, id="zero3_offload-full"),
        pytest.param("zero2", {}, id="zero2-full", marks=pytest.mark.soak),
        pytest.param("zero3", {}, id="zero3-full", marks=pytest.mark.soak),
        pytest.param("zero2", {"lora": LORA}, id="zero2-lora", marks=pytest.mark.soak),
        pytest.param(
            "zero3_offload", {"lora": LORA}, id="zero3_offload-lora", marks=pytest.mark.soak
        ),
        pytest.param(
            "zero2", {"sft": {"steps": 2}}, id="zero2-full-warm-up", marks=pytest.mark.soak
        ),
    ],
)
def test_a_model_trained_by_two_nodes_says_the_same_when_loaded_again(
    start: Start, data: Any, tmp_path: Path, stage: str, changes: dict[str, Any]
) -> None:
    said = tmp_path / "said.pt"
    with two_hosts() as hosts:
        nodes = [
            start(
                tmp_path,
                prefix=host.prefix,
                env=host.env | {"SAID": str(said)},
                procs=1,
                deepspeed=stage,
                **changes,
            )
            for host in hosts
        ]
        for ended in [node.finish() for node in nodes]:
            assert ended.code == 0, ended.text
    vlm = load_vlm(str(tmp_path / MODEL), dtype="float32")
    rows = make_dataset(
        list(read_pairs(data.pairs)),
        images=data.images,
        processor=vlm.processor,
        image_aspect="pad",
    )
    with torch.no_grad():
        again = vlm.model(**first_batch(PairCollator(vlm.processor), rows)).logits
    torch.testing.assert_close(again, torch.load(said), rtol=1e-4, atol=1e-4)
    assert largest_difference(demo_model_path("reward"), tmp_path / MODEL) > 1e-5
    assert (tmp_path / MODEL / "model.safetensors").is_file()
