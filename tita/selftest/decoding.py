"""Checks of guided decoding: the engine beside an uncached computation of the same sums.

Tolerances. In float32 only the order of sums differs, and `FLOAT32_NATS` is 100 times what that
gives on these models. In 16 bits each model has rounding errors of its own, which depend on its
depth: so the plain computation in the same numbers on the same device is measured as well, and the
engine may be at most `EXCESS` times as far from float32.
"""

import copy
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

from tita.align import Answer, Engine, EngineOptions, Guidance, Request, Sampling, Token
from tita.align.sequence import Agreement
from tita.align.speculative import DraftPolicy
from tita.selftest.checks import Check, CheckFailed, Figures, NotHere
from tita.selftest.random_llava import Size, question, random_llava, save_vlm
from tita.selftest.uncached import answer_log_probs, combine, generate
from tita.vlm.loading import VLM, Models, load_vlm

FLOAT32_NATS = 1e-3
EXCESS = 2.0
NUM_TOKENS = 12
WEIGHT = 0.5
LOCKSTEP = EngineOptions(max_drafts=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where the checks run, and the sizes of their models."""

    device: str
    """`cpu` or `cuda`."""
    dtypes: tuple[torch.dtype, ...]
    """Of the weights; float32 is among them."""
    base: Size
    reward: Size

    def models(self, dtype: torch.dtype) -> Models:
        """Base, reward and reference, with the same weights for every dtype up to rounding."""
        base, reward, reference = (self._model(role, dtype) for role in _ROLES)
        return Models(base, reward, reference)

    def _model(self, role: str, dtype: torch.dtype) -> VLM:
        size = self.base if role == "base" else self.reward
        vlm = random_llava(role, size, seed=_ROLES.index(role))
        return dataclasses.replace(vlm, model=vlm.model.to(device=self.device, dtype=dtype))


_ROLES = ("base", "reward", "reference")


def checks_of_decoding(setting: Setting) -> list[Check]:
    """The checks, most important first."""
    guided = [
        Check(
            name=f"guidance-{_short(dtype)}",
            group="right",
            about=f"guided decoding in {_short(dtype)} equals the sums of docs/guidance.md, "
            "computed in float32 on the CPU without caches",
            run=partial(_check_guidance, setting, dtype),
        )
        for dtype in setting.dtypes
    ]
    return [
        *guided,
        Check(
            name="image",
            group="right",
            about="both models' log-probabilities depend on the image",
            run=partial(_check_image, setting),
        ),
        Check(
            name="weight-0",
            group="right",
            about="weight 0 gives the tokens of transformers' generate",
            run=partial(_check_weight_0, setting),
        ),
        Check(
            name="batch",
            group="right",
            about="requests that enter and leave a batch get the answers that they get alone",
            run=partial(_check_batch, setting),
        ),
        Check(
            name="drafts",
            group="right",
            about="speculative decoding, of one answer and of several, gives the tokens of "
            "lockstep decoding, sampled ones too",
            run=partial(_check_drafts, setting),
        ),
        *(
            Check(
                name=f"quantized-{bits}bit",
                group="right",
                about=f"a base model in {bits} bits is guided like any other",
                run=partial(_check_quantized, setting, bits),
                expected_s=20,
            )
            for bits in (4, 8)
        ),
        Check(
            name="device-map",
            group="right",
            about="a base model that is spread over several GPUs gives the same answers",
            run=partial(_check_device_map, setting),
            expected_s=20,
        ),
    ]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _requests(setting: Setting, *, weight: float = WEIGHT, number: int = 3) -> list[Request]:
    """Requests of different lengths, with an image each."""
    return [
        question(
            each, weight=weight, num_tokens=NUM_TOKENS - each, num_words=5 + 4 * each,
            size=setting.base,
        )
        for each in range(number)
    ]  # fmt: skip


def _explained(request: Request, form: str = "tita") -> Request:
    guidance = Guidance(weight=request.guidance.weight, form=form)
    return dataclasses.replace(request, guidance=guidance, explain=True)


def _plain(vlm: VLM, request: Request, answer: Answer) -> Tensor:
    return answer_log_probs(vlm, request, answer=[token.id for token in answer.tokens])


def _reported(answers: Sequence[Answer], figure: str) -> list[float]:
    """The log-probabilities that the engine reports for all tokens of all answers.

    Args:
        figure: name of the field of `Token`.
    """
    return [cast(float, getattr(token, figure)) for each in answers for token in each.tokens]


def _looked_up(answers: Sequence[Answer], tables: Sequence[Tensor]) -> list[float]:
    """The same from log-probabilities[T, V] of each answer."""
    return [
        float(row[token.id])
        for answer, table in zip(answers, tables, strict=True)
        for token, row in zip(answer.tokens, table, strict=True)
    ]


def _mean_error(values: Sequence[float], wanted: Sequence[float]) -> float:
    """Mean absolute difference in nats."""
    return sum(abs(a - b) for a, b in zip(values, wanted, strict=True)) / len(values)


def _check_guidance(setting: Setting, dtype: torch.dtype) -> Figures:
    models = setting.models(dtype)
    exact = {
        role: dataclasses.replace(vlm, model=copy.deepcopy(vlm.model).cpu().float())
        for role, vlm in models.by_role().items()
    }
    engine = Engine(models, LOCKSTEP)
    figures: dict[str, float] = {}
    for form in ("tita", "genarm", "dpo"):
        requests = [_explained(request, form) for request in _requests(setting)]
        answers = engine.generate(requests)
        sides = [(exact, "exact")]
        if dtype != torch.float32:
            sides.append((models.by_role(), "same"))
        tables: dict[str, dict[str, list[Tensor]]] = {}
        for vlms, side in sides:
            found = {
                role: [_plain(vlm, *each) for each in zip(requests, answers, strict=True)]
                for role, vlm in vlms.items()
            }
            found["combined"] = [
                combine(
                    found["base"][n], found["reward"][n], weight=WEIGHT, form=form,
                    reference=found["reference"][n],
                )
                for n in range(len(answers))
            ]  # fmt: skip
            tables[side] = found
        for figure in ("base", "reward", "combined"):
            exactly = _looked_up(answers, tables["exact"][figure])
            mean = _mean_error(_reported(answers, figure), exactly)
            bound = FLOAT32_NATS
            if dtype != torch.float32:
                bound += EXCESS * _mean_error(_looked_up(answers, tables["same"][figure]), exactly)
            figures[f"{form}_{figure}_mean_error_nats"] = mean
            figures[f"{form}_{figure}_bound_nats"] = bound
            if not mean <= bound:
                raise CheckFailed(
                    f"{figure} log-probabilities of form {form} differ by {mean:.2g} nats on "
                    f"average, bound {bound:.2g}"
                )
        if dtype == torch.float32:
            _check_greedy(answers, tables["exact"]["combined"], form)
    return figures


def _check_greedy(answers: Sequence[Answer], combined: Sequence[Tensor], form: str) -> None:
    """Every token is the most likely one, ties within the tolerance aside."""
    for answer, table in zip(answers, combined, strict=True):
        for place, (token, row) in enumerate(zip(answer.tokens, table, strict=True)):
            if float(row.max() - row[token.id]) > FLOAT32_NATS:
                raise CheckFailed(
                    f"form {form}: token {token.id} at position {place} is not the most likely one"
                )


def _check_image(setting: Setting) -> Figures:
    engine = Engine(setting.models(torch.float32), LOCKSTEP)
    first, second = _requests(setting, number=2)
    other = dataclasses.replace(first, images=second.images)
    one, two = engine.generate([_explained(first), _explained(other)])
    figures = {}
    for figure in ("base", "reward"):
        change = abs(_first(one, figure) - _first(two, figure))
        figures[f"{figure}_change_nats"] = change
        if not change > FLOAT32_NATS and one.token_ids[0] == two.token_ids[0]:
            raise CheckFailed(f"another image changes nothing for the {figure} model")
    return figures


def _first(answer: Answer, figure: str) -> float:
    token: Token = answer.tokens[0]
    return cast(float, getattr(token, figure))


def _check_weight_0(setting: Setting) -> Figures:
    models = setting.models(torch.float32)
    requests = _requests(setting, weight=0.0)
    answers = Engine(models, LOCKSTEP).generate(requests)
    for request, answer in zip(requests, answers, strict=True):
        (wanted,) = generate(models.base, [request])
        if wanted != list(answer.token_ids):
            raise CheckFailed(f"generate gives {wanted}, the engine {list(answer.token_ids)}")
    return {"answers": len(requests)}


def _alone(engine: Engine, requests: Sequence[Request]) -> Iterator[Answer]:
    for request in requests:
        yield from engine.generate([request])


def _check_batch(setting: Setting) -> Figures:
    """Eight requests, three at a time, so that rows of the caches are freed and taken again."""
    engine = Engine(setting.models(torch.float32), LOCKSTEP)
    requests = [
        _explained(dataclasses.replace(request, guidance=Guidance(weight=weight)))
        for request, weight in zip(
            _requests(setting, number=8), (0.5, 0.0, 1.0, 0.5, 0.3, 0.0, 0.5, 2.0), strict=True
        )
    ]
    together: list[Answer] = [None] * len(requests)  # type: ignore[list-item]
    for number, answer in engine.generate_as_completed(requests, batch_size=3):
        if not isinstance(answer, Answer):
            raise answer
        together[number] = answer
    worst = 0.0
    for number, (one, other) in enumerate(
        zip(_alone(engine, requests), together, strict=True), start=1
    ):
        if one.token_ids != other.token_ids:
            raise CheckFailed(
                f"request {number} gets {list(other.token_ids)} in a batch, "
                f"{list(one.token_ids)} alone"
            )
        worst = max(
            worst,
            *(abs(a.combined - b.combined) for a, b in zip(one.tokens, other.tokens, strict=True)),
        )
    if worst > FLOAT32_NATS:
        raise CheckFailed(
            f"log-probabilities in a batch differ by {worst:.2g} nats from those alone"
        )
    return {"largest_difference_nats": worst}


def _check_drafts(setting: Setting) -> Figures:
    models = setting.models(torch.float32)
    # A reward model that equals the base is always right, so drafts of all lengths are accepted.
    agreeing = Models(models.base, setting.models(torch.float32).base)
    sampled = Sampling(
        max_new_tokens=NUM_TOKENS, ignore_end=True, temperature=0.8, top_p=0.9, seed=7
    )
    greedy = _requests(setting)
    asked = [*greedy, *(dataclasses.replace(each, sampling=sampled) for each in greedy)]
    figures = {"answers": 0, "drafts_for_several": 0}
    for pair in (models, agreeing):
        wanted = Engine(pair, LOCKSTEP).generate(asked)
        drafting = Engine(pair, EngineOptions(max_drafts=4))
        several = Engine(pair, EngineOptions(max_drafts=4, max_draft_rows=len(asked)))
        several.draft_policy = _AlwaysTwo()
        for name, found in (
            ("drafts", list(_alone(drafting, asked))),
            ("drafts for several answers", several.generate(asked)),
        ):
            for one, other in zip(wanted, found, strict=True):
                if one.token_ids != other.token_ids:
                    raise CheckFailed(
                        f"lockstep gives {list(one.token_ids)}, {name} {list(other.token_ids)}"
                    )
                figures["answers"] += 1
        figures["drafts_for_several"] += several.draft_policy.num_drafted
    return figures


class _AlwaysTwo(DraftPolicy):
    """Drafts two tokens whether that pays or not."""

    def num_drafts_together(self, agreements: Sequence[Agreement], *, limit: int) -> int:
        return min(limit, 2)


def _check_quantized(setting: Setting, bits: int) -> Figures:
    if setting.device == "cpu":
        raise NotHere("bitsandbytes quantises on a GPU")
    if find_spec("bitsandbytes") is None:
        raise NotHere("bitsandbytes is not installed")
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    return _like_plain(_reloaded(setting, quantization=config, device_map="cuda:0"), setting)


def _check_device_map(setting: Setting) -> Figures:
    if torch.cuda.device_count() < 2:
        raise NotHere("fewer than two GPUs")
    return _like_plain(_reloaded(setting, device_map="balanced"), setting)


def _reloaded(setting: Setting, **options: Any) -> Models:
    """Base and reward in bfloat16, the base loaded from files with these options of `load_vlm`."""
    models = setting.models(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        save_vlm(models.base, folder)
        base = load_vlm(folder, dtype="bfloat16", **options)
    return Models(base, models.reward)


def _like_plain(models: Models, setting: Setting) -> Figures:
    """Compare the engine with the plain computation on the same models."""
    assert models.reward is not None
    requests = [_explained(request) for request in _requests(setting)]
    answers = Engine(models, LOCKSTEP).generate(requests)
    each = list(zip(requests, answers, strict=True))
    base = [_plain(models.base, *one) for one in each]
    reward = [_plain(models.reward, *one) for one in each]
    combined = [
        combine(one, other, weight=WEIGHT, form="tita")
        for one, other in zip(base, reward, strict=True)
    ]
    mean = _mean_error(_reported(answers, "combined"), _looked_up(answers, combined))
    # Kernels for one token and for a whole prompt round differently in 16 bits.
    bound = 0.1
    if not mean <= bound:
        raise CheckFailed(f"log-probabilities differ by {mean:.2g} nats on average, bound {bound}")
    return {"mean_error_nats": mean, "bound_nats": bound}
