"""Both engines on the same models, and the comparison of their answers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import PIL.Image

from tita.align import Answer, Engine, Guidance, Request, Sampling
from tita.align.requests import EngineOptions
from tita.demo.models import demo_model_path
from tita.demo.scenes import make_scenes
from tita.engine.engine_options import VllmOptions
from tita.engine.vllm_batch import VllmBatch
from tita.engine.vllm_engine import VllmEngine, load_outlines, start_vllm
from tita.vllm_plugin.outline import models_of
from tita.vlm.loading import VLM, load_vlm
from tita.vlm.model_set import load_role

GUIDANCES = (
    Guidance(weight=0.0),
    Guidance(weight=0.3),
    Guidance(weight=0.5, plausibility=0.1),
    Guidance(weight=1.0),
    Guidance(weight=1.5),
    Guidance(weight=0.5, form="genarm"),
)


Case = tuple[dict[str, str], list[Request], list[Answer]]
"""Paths of models by role, requests, and the transformers engine's answers."""


def reference_engine(paths: dict[str, str]) -> Engine:
    """The transformers engine, which defines the answers."""
    vlms: dict[str, VLM] = {}
    for role, path in paths.items():
        vlms[role] = load_role(role, path, loaded=vlms, load=load_vlm)
    return Engine(models_of(vlms), EngineOptions(max_drafts=0))


@contextmanager
def vllm_batch(
    paths: dict[str, str], *, max_adapters: int = 16, **options: object
) -> Iterator[VllmBatch]:
    """vLLM in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    chosen = {
        "dtype": "float32",
        "max_batch": 8,
        "compile": False,
        "processes": False,
        "kv_cache_bytes": 2**27,
        **options,
    }
    batch = start_vllm(
        load_outlines(paths),
        VllmOptions(**chosen),  # type: ignore[arg-type]
        engine_options=EngineOptions(max_adapters=max_adapters),
    )
    try:
        yield batch
    finally:
        batch.close()
        cleanup_dist_env_and_memory()


def answers(batch: VllmBatch, requests: Sequence[Request]) -> list[Answer]:
    return VllmEngine(batch, batch.models).generate(requests)


def pictures(number: int) -> list[PIL.Image.Image]:
    scenes = make_scenes("validation", number=number)
    return [PIL.Image.fromarray((255 * each.pixels).round().astype("uint8")) for each in scenes]


def mixed_requests(
    number: int, guidances: Sequence[Guidance] = GUIDANCES, *, long: int = 40
) -> list[Request]:
    """Questions about `number` images, short and long answers, with all the guidances mixed."""
    return [
        Request(question=question, images=(image,), guidance=guidance, sampling=sampling)
        for image in pictures(number)
        for question in ("what number is written ?", "is there a 3 in the image ?")
        for guidance in guidances
        for sampling in (
            Sampling(max_new_tokens=12),
            Sampling(max_new_tokens=long, ignore_end=True),
        )
    ]


def demo_case(number: int, guidances: Sequence[Guidance], *, long: int = 40) -> Case:
    """The demo's models, with the base as the reference; requests as of `mixed_requests`."""
    base, reward = (str(demo_model_path(role)) for role in ("base", "reward"))
    paths = {"base": base, "reward": reward, "reference": base}
    requests = mixed_requests(number, guidances, long=long)
    expected = reference_engine(paths).generate(requests)
    assert any(answer.num_changed for answer in expected)
    return paths, requests, expected


def assert_same(expected: Sequence[Answer], found: Sequence[Answer]) -> None:
    """Tokens, text, reason and counts of all answers."""
    different = [
        (number, one, other)
        for number, (one, other) in enumerate(zip(expected, found, strict=True))
        if one != other
    ]
    assert not different, f"{len(different)} of {len(expected)} differ, first: {different[0]}"
