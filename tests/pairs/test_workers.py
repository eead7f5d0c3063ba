"""Which process of a run answers which batches, on which GPUs, and with which engine."""

import os
from typing import Any

import pytest
import torch
from PIL import Image

from tita.align import Request
from tita.align.views import image_digest
from tita.errors import TitaError
from tita.pairs.distort import attach_noise
from tita.pairs.workers import Worker, this_worker
from tita.recipes import PairsRecipe
from tita.vlm.noise import SevaNoise


def recipe(**given: Any) -> PairsRecipe:
    return PairsRecipe(questions="data", **given)


def workers(
    monkeypatch: pytest.MonkeyPatch, *, gpus: int, visible: str | None, size: int
) -> list[tuple[Worker | None, str | None]]:
    """Each process of two nodes with four processes: its worker, and the GPUs it sees."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    found = []
    for rank in range(8):
        with monkeypatch.context() as patch:
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", "8")
            patch.setenv("LOCAL_RANK", str(rank % 4))
            patch.setenv("LOCAL_WORLD_SIZE", "4")
            # Both forms, so that the patch undoes what this_worker() sets.
            patch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
            if visible is None:
                patch.delenv("CUDA_VISIBLE_DEVICES")
            worker = this_worker(
                recipe(engine="vllm", vllm={"tensor_parallel_size": size}) if size > 1 else recipe()
            )
            found.append((worker, os.environ.get("CUDA_VISIBLE_DEVICES")))
    return found


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, names in ((None, "0123"), ("4,5,6,7", "4567")):
        found = workers(monkeypatch, gpus=4, visible=visible, size=1)
        assert [seen for _, seen in found] == [*names, *names]
        assert [worker for worker, _ in found] == [Worker(number=n, total=8) for n in range(8)]


def test_processes_that_share_a_model_are_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    found = workers(monkeypatch, gpus=4, visible=None, size=2)
    assert [worker and worker.number for worker, _ in found] == [
        0, None, 1, None, 2, None, 3, None,
    ]  # fmt: skip
    assert [seen for worker, seen in found if worker] == ["0,1", "2,3", "0,1", "2,3"]
    with pytest.raises(TitaError, match="tensor_parallel_size is 3, and a node has 4 processes"):
        workers(monkeypatch, gpus=4, visible=None, size=3)


@pytest.mark.parametrize("gpus", [0, 1])
def test_processes_without_gpus_of_their_own_see_what_there_is(
    monkeypatch: pytest.MonkeyPatch, gpus: int
) -> None:
    found = workers(monkeypatch, gpus=gpus, visible=None, size=1)
    assert {seen for _, seen in found} == {None}


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (
            {"engine": "vllm", "strategy": "contrast"},
            "engine vllm does not build pairs with the form vcd",
        ),
        ({"vllm": {"max_model_len": 512}}, "`vllm` has no effect without `engine=vllm`"),
    ],
)
def test_what_an_engine_does_not_have_is_refused(given: dict[str, Any], fault: str) -> None:
    with pytest.raises(TitaError, match=fault):
        recipe(**given)


def test_images_with_different_noise_have_different_digests() -> None:
    """An engine that caches images by their digest must not take one for the other."""
    clean = Image.new("RGB", (8, 8), (90, 20, 20))
    noisy = [attach_noise(clean, SevaNoise(500, seed), pad=False) for seed in (1, 2, 1)]
    digests = [image_digest(Request(question="What?", images=(i,))) for i in (clean, *noisy)]
    assert len(set(digests)) == 3
    assert digests[1] == digests[3]
