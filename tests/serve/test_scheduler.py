"""The thread that steps the models outlives a step that fails."""

import asyncio

import pytest

from tita.align import Request
from tita.align.preparing import Preparer
from tita.align.stepper import Stepper
from tita.demo.models import demo_model_path
from tita.serve import ServeOptions
from tita.serve.failures import Refusal
from tita.serve.metrics import Metrics
from tita.serve.scheduler import Scheduler
from tita.vlm import VLM, load_vlm


@pytest.fixture(scope="module")
def models() -> tuple[VLM, VLM]:
    return load_vlm(str(demo_model_path("base"))), load_vlm(str(demo_model_path("reward")))


def test_a_failing_step_ends_its_answers_and_not_the_server(models: tuple[VLM, VLM]):
    options = ServeOptions()
    stepper = Stepper(*models)
    preparer = Preparer(*models)
    asked = Request(question="is there a 7 ?", weight=0.3)
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
            async for _ in scheduler.claim(1).submit([preparer.prepare(asked)]).said():
                pass
        answer = scheduler.claim(1).submit([preparer.prepare(asked)])
        return "".join([said.text async for _, said in answer.said()])

    try:
        assert asyncio.run(talk())
        assert b'outcome="error"} 1.0' in metrics.text()
    finally:
        scheduler.stop()
    assert not scheduler.alive
