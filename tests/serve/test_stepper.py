"""The rows of a running batch are answered as if each were alone, and as the engine answers."""

import asyncio
import io

import PIL.Image
import pytest
from serve_process import picture

from tita.align import Engine, Request
from tita.align import Sampling as EngineSampling
from tita.demo.models import demo_model_path
from tita.serve import ServeOptions
from tita.serve.failures import Refusal
from tita.serve.job import Job, Sampling, Turn
from tita.serve.metrics import Metrics
from tita.serve.options import Limits
from tita.serve.preparing import Preparer
from tita.serve.scheduler import Scheduler
from tita.serve.stepper import Stepper
from tita.vlm import VLM, load_vlm

QUESTIONS = ["what color is the circle ?", "is there a 7 ?", "describe the image .", "what"]
COLOURS = ["red", "blue", "green", "yellow"]


@pytest.fixture(scope="module")
def models() -> tuple[VLM, VLM]:
    return load_vlm(str(demo_model_path("base"))), load_vlm(str(demo_model_path("reward")))


def image(colour: str) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(picture(colour))).convert("RGB")


def job(index: int, *, weight: float, num_tokens: int = 24, colour: str | None = None) -> Job:
    shown = image(colour or COLOURS[index % 4])
    return Job(
        turns=(Turn(role="user", parts=(shown, QUESTIONS[index % 4])),),
        weight=weight,
        sampling=Sampling(max_new_tokens=num_tokens),
    )


def run(stepper: Stepper, preparer: Preparer, jobs: list[Job], *, stagger: int = 0) -> list[str]:
    """Answers to jobs that come in one after another, `stagger` steps apart."""
    texts: dict[object, str] = {}
    left = list(enumerate(jobs))
    while left or len(stepper):
        for key, each in left[:1] if stagger else left:
            texts[key] = ""
            stepper.admit(key, preparer.prepare(each))
        del left[: 1 if stagger else len(left)]
        for _ in range(stagger or 1):
            for key, said in stepper.step().items():
                assert not isinstance(said, Exception), said
                texts[key] += said.text
    return [texts[key] for key in range(len(jobs))]


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prefill_tokens", [512, 3])
def test_answers_are_the_engines(models: tuple[VLM, VLM], weight: float, prefill_tokens: int):
    options = ServeOptions(prefill_tokens=prefill_tokens)
    preparer = Preparer(*models, limits=Limits())
    jobs = [job(index, weight=weight) for index in range(6)]
    requests = [
        Request(
            question=QUESTIONS[index % 4],
            images=each.images,
            weight=weight,
            sampling=EngineSampling(max_new_tokens=24),
        )
        for index, each in enumerate(jobs)
    ]
    wanted = [answer.text for answer in Engine(*models).generate(requests)]
    assert any(wanted)
    for stagger in (0, 1, 3):
        stepper = Stepper(*models, options=options)
        assert run(stepper, preparer, jobs, stagger=stagger) == wanted
        assert len(stepper) == 0
        assert stepper.num_cells == 0


def test_rows_of_unlike_weights_share_a_batch(models: tuple[VLM, VLM]):
    preparer = Preparer(*models, limits=Limits())
    jobs = [job(index, weight=(0.0, 0.4, 1.0)[index % 3]) for index in range(6)]
    alone = [run(Stepper(*models, options=ServeOptions()), preparer, [each])[0] for each in jobs]
    assert run(Stepper(*models, options=ServeOptions()), preparer, jobs, stagger=2) == alone


def test_an_image_asked_about_again_is_not_looked_at_again(models: tuple[VLM, VLM]):
    stepper = Stepper(*models, options=ServeOptions())
    preparer = Preparer(*models, limits=Limits())
    looks = 0

    def count(*_: object) -> None:
        nonlocal looks
        looks += 1

    hook = models[0].model.model.vision_tower.register_forward_hook(count)
    try:
        jobs = [job(index, weight=0.3, colour="red") for index in range(4)]
        again = run(stepper, preparer, jobs, stagger=1)
        assert looks == 1
        fresh = Stepper(*models, options=ServeOptions(prefix_cache_bytes=0))
        assert run(fresh, preparer, jobs) == again
        assert looks == 5
        run(stepper, preparer, [job(0, weight=0.3, colour="blue")])
        assert looks == 6
    finally:
        hook.remove()
    assert 0 < stepper.prefixes.num_bytes <= ServeOptions().prefix_cache_bytes


def test_prefixes_stay_within_their_room(models: tuple[VLM, VLM]):
    room = 40_000
    stepper = Stepper(*models, options=ServeOptions(prefix_cache_bytes=room))
    preparer = Preparer(*models, limits=Limits())
    run(stepper, preparer, [job(index, weight=0.3) for index in range(4)])
    assert 0 < stepper.prefixes.num_bytes <= room


def test_release_frees_a_place_at_any_point(models: tuple[VLM, VLM]):
    stepper = Stepper(*models, options=ServeOptions(prefill_tokens=3))
    preparer = Preparer(*models, limits=Limits())
    alone = run(stepper, preparer, [job(2, weight=0.3)])
    for key in ("entering", "writing", 0):
        stepper.admit(key, preparer.prepare(job(2, weight=0.3)))
        if key != 0:
            for _ in range(6 if key == "writing" else 1):
                stepper.step()
            stepper.release(key)
    text = ""
    while len(stepper):
        text += "".join(said.text for said in stepper.step().values())
    assert [text] == alone


def test_a_row_without_numbers_harms_no_other(models: tuple[VLM, VLM]):
    stepper = Stepper(*models, options=ServeOptions())
    preparer = Preparer(*models, limits=Limits())
    alone = run(stepper, preparer, [job(0, weight=0.3)])
    poisoned = preparer.prepare(job(1, weight=0.3))
    poisoned.base["pixel_values"] = poisoned.base["pixel_values"] * float("nan")
    stepper.admit("bad", poisoned)
    stepper.admit("good", preparer.prepare(job(0, weight=0.3)))
    text, errors = "", []
    while len(stepper):
        for key, said in stepper.step().items():
            if key == "good":
                text += said.text
            else:
                errors.append(said)
    assert [text] == alone
    assert ["NaN" in str(error) for error in errors] == [True]


def test_a_failing_step_ends_its_answers_and_not_the_server(models: tuple[VLM, VLM]):
    options = ServeOptions()
    stepper = Stepper(*models, options=options)
    preparer = Preparer(*models, limits=Limits())
    metrics = Metrics("tita")
    scheduler = Scheduler(stepper, options=options, metrics=metrics)
    step, fail = stepper.step, [True]

    def sometimes() -> object:
        if fail.pop() if fail else False:
            raise RuntimeError("CUDA error")
        return step()

    stepper.step = sometimes  # type: ignore[method-assign, assignment]
    scheduler.start()

    async def talk() -> str:
        with pytest.raises(Refusal, match="internal error"):
            async for _ in scheduler.submit([preparer.prepare(job(0, weight=0.3))]).said():
                pass
        answer = scheduler.submit([preparer.prepare(job(0, weight=0.3))])
        return "".join([said.text async for _, said in answer.said()])

    try:
        assert asyncio.run(talk())
        assert b'outcome="error"} 1.0' in metrics.text()
    finally:
        scheduler.stop()
    assert not scheduler.alive
