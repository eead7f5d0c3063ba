"""The engine says token for token what the definitions say, alone and in batches."""

import dataclasses
import io
import re
from pathlib import Path

import pytest
import torch

from tests.align.definition import asked, log_probs
from tita.align import Engine, EngineOptions, Request, Said, Sampling
from tita.align.noise import gumbel
from tita.demo.models import demo_model_path
from tita.errors import TitaError
from tita.vlm import VLM, Prompt, load_vlm, prepare

LENGTH = 6


@pytest.fixture(scope="module")
def engine(base: VLM, reward: VLM) -> Engine:
    return Engine(base, reward)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Prompts of unequal lengths; one answer of two digits, so that decoding goes on."""
    return asked(8, sampling=Sampling(max_new_tokens=LENGTH))


def at(requests: list[Request], weight: float) -> list[Request]:
    return [dataclasses.replace(request, weight=weight) for request in requests]


def transformers_answers(vlm: VLM, requests: list[Request]) -> list[str]:
    """What transformers' own greedy `generate` says, one request at a time."""
    answers = []
    for request in requests:
        inputs = prepare(vlm, [Prompt(text=request.question, images=request.images)])
        output = vlm.model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        answers.append(vlm.tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


def slow_choice(scores: torch.Tensor, sampling: Sampling, *, position: int) -> int:
    """Temperature, top-k, top-p by sorting, and the noise of the seed."""
    if not sampling.temperature:
        return int(scores.argmax())
    ordered, tokens = (scores / sampling.temperature).sort(descending=True)
    ordered = ordered[: sampling.top_k or None]
    chances = ordered.softmax(-1)
    kept = tokens[: len(ordered)][chances.cumsum(-1) - chances < sampling.top_p]
    noise = gumbel(len(scores), seed=sampling.seed, position=position)
    return int(kept[(scores / sampling.temperature + noise)[kept].argmax()])


@torch.inference_mode()
def slow_answer(base: VLM, reward: VLM, request: Request) -> list[int]:
    """The definition itself: no cache, no batch, both models forward over everything each step."""
    sides = [(vlm, prepare(vlm, [request.prompt])) for vlm in (base, reward)]
    tokens: list[int] = []
    while len(tokens) < LENGTH:
        logs = [log_probs(vlm, inputs, tokens) for vlm, inputs in sides]
        mixed = logs[0] + request.weight * (logs[1] - logs[0])
        token = slow_choice(mixed[0], request.sampling, position=len(tokens))
        if token == base.tokenizer.eos_token_id:
            break
        tokens.append(token)
    return tokens


def test_weight_0_is_the_base_under_generate(
    engine: Engine, base: VLM, requests: list[Request]
) -> None:
    answers = [answer.text for answer in engine.generate(at(requests, 0.0))]
    assert answers == transformers_answers(base, requests)


def test_weight_1_is_the_reward_under_generate(
    engine: Engine, reward: VLM, requests: list[Request]
) -> None:
    answers = [answer.text for answer in engine.generate(at(requests, 1.0))]
    assert answers == transformers_answers(reward, requests)


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.7])
def test_batches_agree_with_the_definition(
    engine: Engine, base: VLM, reward: VLM, requests: list[Request], weight: float
) -> None:
    guided = at(requests, weight)
    answers = engine.generate(guided)
    for request, answer in zip(guided, answers, strict=True):
        assert list(answer.token_ids) == slow_answer(base, reward, request)


def test_sampling_agrees_with_the_definition(
    engine: Engine, base: VLM, reward: VLM, requests: list[Request]
) -> None:
    ways = [{}, {"top_p": 0.8}, {"top_p": 0.3}, {"top_k": 3}, {"top_p": 0.6, "top_k": 5}]
    warm = [
        dataclasses.replace(
            request,
            weight=0.4,
            sampling=Sampling(max_new_tokens=LENGTH, temperature=2.5, seed=n, **ways[n % 5]),
        )
        for n, request in enumerate(requests)
    ]
    for request, answer in zip(warm, engine.generate(warm), strict=True):
        assert list(answer.token_ids) == slow_answer(base, reward, request)


def test_weights_are_per_request(engine: Engine, requests: list[Request]) -> None:
    weights = [0.0, 0.3, 1.0]
    mixed = [request for w in weights for request in at(requests, w)]
    together = engine.generate(mixed)
    alone = [answer for w in weights for answer in engine.generate(at(requests, w))]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert len({a.token_ids for a in together}) > 3


def test_weights_may_be_whole_numbers(engine: Engine, requests: list[Request]) -> None:
    wanted = engine.generate(at(requests, 1.0))
    whole = [dataclasses.replace(request, plausibility=0) for request in at(requests, 1)]
    assert engine.generate(whole) == wanted


def test_explained_tokens_add_up(engine: Engine, requests: list[Request]) -> None:
    explained = [dataclasses.replace(r, explain=True, weight=0.4) for r in requests]
    plain = engine.generate(at(requests, 0.4))
    for answer, bare in zip(engine.generate(explained), plain, strict=True):
        assert answer.token_ids == bare.token_ids
        ends = int(answer.finish_reason == "stop")
        assert len(answer.tokens) == len(answer.token_ids) + ends
        assert answer.num_changed == sum(token.changed for token in answer.tokens)
        for token in answer.tokens:
            assert max(token.base, token.reward, token.combined) <= 0
    assert all(answer.num_changed == 0 for answer in engine.generate(at(requests, 0.0)))


def test_other_images_for_the_reward_model_change_only_what_it_sees(
    engine: Engine, requests: list[Request]
) -> None:
    other = requests[-1].images
    blind = [dataclasses.replace(r, reward_images=other, weight=0.0) for r in requests]
    assert engine.generate(blind) == engine.generate(at(requests, 0.0))
    half = [dataclasses.replace(r, reward_images=other, weight=0.5) for r in requests]
    assert engine.generate(half) != engine.generate(at(requests, 0.5))


def test_sampling_hangs_on_the_seed_and_not_on_the_batch(
    engine: Engine, requests: list[Request]
) -> None:
    warm = [
        dataclasses.replace(
            request, sampling=Sampling(max_new_tokens=LENGTH, temperature=3.0, seed=seed)
        )
        for seed, request in enumerate(requests)
    ]
    together = engine.generate(warm)
    assert [engine.generate([request])[0].token_ids for request in warm] == [
        answer.token_ids for answer in together
    ]
    assert [a.token_ids for a in together] != [a.token_ids for a in engine.generate(requests)]


def test_sampling_is_not_taken_for_alignment(engine: Engine, requests: list[Request]) -> None:
    sampling = Sampling(max_new_tokens=LENGTH, temperature=3.0, seed=1, top_p=0.95)
    warm = [dataclasses.replace(request, sampling=sampling) for request in requests]
    assert all(answer.num_changed == 0 for answer in engine.generate(at(warm, 0.0)))
    # With next to no weight hardly a choice changes, whatever the noise.
    faint = engine.generate(at(warm, 1e-6))
    assert sum(answer.num_changed for answer in faint) == 0
    assert sum(answer.num_changed for answer in engine.generate(at(warm, 1.0))) > 0


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_repetition_is_penalised_as_under_generate(
    engine: Engine, base: VLM, reward: VLM, requests: list[Request], weight: float
) -> None:
    sampling = Sampling(max_new_tokens=LENGTH, repetition_penalty=1.8, ignore_end=True)
    asked = [dataclasses.replace(request, sampling=sampling) for request in requests[:6]]
    vlm = reward if weight else base
    for request, answer in zip(asked, engine.generate(at(asked, weight)), strict=True):
        inputs = prepare(vlm, [Prompt(text=request.question, images=request.images)])
        output = vlm.model.generate(
            **inputs,
            max_new_tokens=LENGTH,
            do_sample=False,
            repetition_penalty=1.8,
            eos_token_id=-1,
        )
        assert list(answer.token_ids) == output[0, inputs["input_ids"].shape[1] :].tolist()


def test_only_likely_tokens_are_drawn(engine: Engine, requests: list[Request]) -> None:
    """Hot as the noise may be, top-k of 1 and a tiny top-p leave the greedy answer."""
    greedy = [answer.token_ids for answer in engine.generate(requests)]
    for kept in ({"top_k": 1}, {"top_p": 1e-6}):
        sampling = Sampling(max_new_tokens=LENGTH, temperature=50.0, **kept)
        hot = [dataclasses.replace(request, sampling=sampling) for request in requests]
        assert [answer.token_ids for answer in engine.generate(hot)] == greedy


def test_stop_tokens_end_an_answer_before_them(engine: Engine, requests: list[Request]) -> None:
    for request, plain in zip(requests, engine.generate(requests), strict=True):
        sampling = Sampling(max_new_tokens=LENGTH, stop_token_ids=plain.token_ids[-1:])
        (answer,) = engine.generate([dataclasses.replace(request, sampling=sampling)])
        assert answer.finish_reason == "stop"
        assert answer.token_ids == plain.token_ids[: plain.token_ids.index(plain.token_ids[-1])]


def test_a_stream_says_what_the_answer_says(engine: Engine, requests: list[Request]) -> None:
    texts = [""] * len(requests)
    last = [False] * len(requests)
    for place, said in engine.stream(requests):
        assert isinstance(said, Said)
        assert not last[place]
        texts[place] += said.text
        last[place] = said.finish_reason is not None
    assert all(last)
    assert [text.strip() for text in texts] == [a.text for a in engine.generate(requests)]


class TestMistakes:
    """What is wrong with one row is that row's error; the others are answered as ever."""

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

    def test_images_that_are_torn(self, engine: Engine, requests: list[Request]) -> None:
        import PIL.Image

        whole = io.BytesIO()
        PIL.Image.effect_noise((64, 64), 50).save(whole, "PNG")
        torn = PIL.Image.open(io.BytesIO(whole.getvalue()[:1500]))
        bad = dataclasses.replace(requests[0], images=(torn,))
        assert "an image cannot be read" in str(self.answered(engine, requests[:3], bad))

    def test_numbers_that_are_none(self, engine: Engine, requests: list[Request]) -> None:
        """A row whose image the model turns into NaN comes in together with others."""
        import PIL.Image

        marked = PIL.Image.new("RGB", (32, 32), (255, 0, 255))

        def poison(_: object, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            pixels = given[0].clone()
            magenta = (pixels[:, 0] > 0.9) & (pixels[:, 1] < -0.9) & (pixels[:, 2] > 0.9)
            pixels[magenta.flatten(1).all(1)] = float("nan")
            return (pixels,)

        tower = engine.base.model.model.vision_tower
        hook = tower.register_forward_pre_hook(poison)
        try:
            for weight in (0.0, 0.5):
                good = at(requests[:4], weight)
                error = self.answered(engine, good, dataclasses.replace(good[0], images=(marked,)))
                assert "no numbers (NaN)" in str(error)
        finally:
            hook.remove()

    def test_image_marks_in_words_are_words(self, engine: Engine, requests: list[Request]) -> None:
        asked = dataclasses.replace(requests[0], question="what is <image> ?")
        (answer,) = engine.generate([asked])
        assert answer.finish_reason in ("stop", "length")


@pytest.mark.gpu
def test_a_gpu_says_what_the_cpu_says(engine: Engine, requests: list[Request]) -> None:
    """Greedy and sampled, together and with drafts: noise does not come from the device."""
    on_gpu = [load_vlm(str(demo_model_path(role))) for role in ("base", "reward")]
    for vlm in on_gpu:
        vlm.model.to("cuda")
    there = Engine(*on_gpu)
    for temperature in (0.0, 2.0):
        sampling = Sampling(max_new_tokens=LENGTH, temperature=temperature, seed=4)
        asked = [dataclasses.replace(request, sampling=sampling) for request in requests]
        wanted = [answer.token_ids for answer in engine.generate(asked)]
        assert [answer.token_ids for answer in there.generate(asked)] == wanted
        assert [there.generate([each])[0].token_ids for each in asked] == wanted


def test_length_is_bounded_and_said(engine: Engine, requests: list[Request]) -> None:
    short = [dataclasses.replace(r, sampling=Sampling(max_new_tokens=1)) for r in requests]
    for answer in engine.generate(short):
        assert len(answer.token_ids) == 1
        assert answer.finish_reason == "length"


def test_nothing_asked_nothing_answered(engine: Engine) -> None:
    assert engine.generate([]) == []


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_weights_that_mean_nothing_are_refused(weight: float, requests: list[Request]) -> None:
    with pytest.raises(TitaError, match="guidance weight"):
        at(requests, weight)


def test_guidance_without_a_reward_model_is_refused(base: VLM, requests: list[Request]) -> None:
    with pytest.raises(TitaError, match="without a reward model"):
        Engine(base).generate(at(requests, 0.3))


def test_an_unknown_form_is_refused(base: VLM) -> None:
    with pytest.raises(TitaError, match="choose tita, genarm or dpo"):
        Engine(base, options=EngineOptions(form="sum"))
