"""Errors of one request are reported and do not affect others."""

import dataclasses
import io
import re
from pathlib import Path

import pytest
import torch

from tests.align.definition import at
from tita.align import Engine, Guidance, Request
from tita.errors import TitaError
from tita.vlm.loading import VLM, Models


class TestRequestErrors:
    """The bad request gets an error; the others get the same answers as without it."""

    def answered(self, engine: Engine, good: list[Request], bad: Request) -> TitaError:
        wanted: list[object] = [*engine.generate(good)]
        both = engine.generate([good[0], bad, *good[1:]], return_errors=True)
        error = both.pop(1)
        assert both == wanted
        with pytest.raises(TitaError, match=re.escape(str(error))):
            engine.generate([good[0], bad])
        assert isinstance(error, TitaError)
        return error

    def test_prompts_longer_than_the_context(self, engine: Engine, requests: list[Request]) -> None:
        bad = dataclasses.replace(requests[0], question="what " * 99)
        error = self.answered(engine, requests[:3], bad)
        assert "the prompt has 106 tokens, more than 63" in str(error)

    def test_unreadable_images(
        self, engine: Engine, requests: list[Request], tmp_path: Path
    ) -> None:
        (tmp_path / "torn.png").write_bytes(b"\x89PNG")
        for name, words in (("torn.png", "not a readable image"), ("none.png", "no such image")):
            bad = dataclasses.replace(requests[0], images=(tmp_path / name,))
            error = self.answered(engine, requests[:3], bad)
            assert words in str(error)
            assert name in str(error)

    def test_truncated_images(self, engine: Engine, requests: list[Request]) -> None:
        import PIL.Image

        whole = io.BytesIO()
        PIL.Image.effect_noise((64, 64), 50).save(whole, "PNG")
        torn = PIL.Image.open(io.BytesIO(whole.getvalue()[:1500]))
        bad = dataclasses.replace(requests[0], images=(torn,))
        assert "an image cannot be read" in str(self.answered(engine, requests[:3], bad))

    def test_nan_logits(self, engine: Engine, requests: list[Request]) -> None:
        """A request whose image becomes NaN in the model shares a prefill with others."""
        import PIL.Image

        marked = PIL.Image.new("RGB", (32, 32), (255, 0, 255))

        def poison(_: object, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            pixels = given[0].clone()
            magenta = (pixels[:, 0] > 0.9) & (pixels[:, 1] < -0.9) & (pixels[:, 2] > 0.9)
            pixels[magenta.flatten(1).all(1)] = float("nan")
            return (pixels,)

        tower = engine.models.base.model.model.vision_tower
        hook = tower.register_forward_pre_hook(poison)
        try:
            for weight in (0.0, 0.5):
                good = at(requests[:4], weight)
                error = self.answered(engine, good, dataclasses.replace(good[0], images=(marked,)))
                assert "not numbers (NaN)" in str(error)
        finally:
            hook.remove()

    def test_image_marks_in_text_are_text(self, engine: Engine, requests: list[Request]) -> None:
        asked = dataclasses.replace(requests[0], question="what is <image> ?")
        (answer,) = engine.generate([asked])
        assert answer.finish_reason in ("stop", "length")


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_invalid_weights_are_refused(weight: float, requests: list[Request]) -> None:
    with pytest.raises(TitaError, match="guidance weight"):
        at(requests, weight)


def test_guidance_without_a_reward_model_is_refused(base: VLM, requests: list[Request]) -> None:
    with pytest.raises(TitaError, match="without a reward model"):
        Engine(Models(base)).generate(at(requests, 0.3))


def test_an_unknown_form_is_refused(base: VLM) -> None:
    with pytest.raises(TitaError, match="choose tita, genarm, dpo, vcd, tita_vcd, m3id"):
        Engine(Models(base)).generate([Request(guidance=Guidance(form="sum"))])
