"""Asks models behind OpenAI-compatible endpoints, and ranks answers by a judge model there."""

import base64
import io
import json
import math
import os
import random
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import openai
from PIL.Image import Image

from tita.activity import mark_progress
from tita.errors import ExitCode, TitaError
from tita.pairs.distort import derive_seed
from tita.pairs.ranking import Ranking, RankingTask
from tita.recipes import EndpointRankerRecipe, EndpointRecipe
from tita.storage.image_shards import read_image

_MEDIA_TYPES = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp", ".gif": "gif"}
_REPLY = re.compile(r'\{[^{}]*"scores"[^{}]*\}')
_LATER = frozenset((408, 409, 429))
_PROMPT = """\
Score answers to a question about the image by this criterion: {criterion}

Question: {question}

{answers}

Reply with one JSON object: {{"scores": [...]}}, with one number from 1 (worst) to 10 (best) for
each of the {number} answers, in their order. Only answers that are equally good have equal scores.
"""


class EndpointUnavailable(TitaError):
    """The endpoint answers no request at the moment."""

    exit_code = ExitCode.RETRY


class Endpoint:
    """A client for one endpoint."""

    def __init__(self, recipe: EndpointRecipe, *, where: str) -> None:
        """Raises TitaError if the environment has no API key although the recipe names one.

        Args:
            recipe: address, model and limits.
            where: the recipe's key of it, for errors.
        """
        self._recipe = recipe
        self._where = where
        self._key = _read_key(recipe, where=where)
        self._client = openai.OpenAI(
            base_url=recipe.base_url,
            # The client requires one.
            api_key=self._key or "none",
            timeout=recipe.timeout_s,
            max_retries=recipe.retries,
        )

    def complete(self, messages: Any, **options: Any) -> Any:
        """The chat completion, or the `openai.APIError` of a request that failed."""
        try:
            return self._client.chat.completions.create(
                model=self._recipe.model, messages=messages, **options
            )
        except openai.APIError as error:
            return error
        finally:
            mark_progress()

    def unavailable(self, error: openai.APIError) -> TitaError:
        """The error of a run whose requests all fail, without the API key."""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if self._key:
            reason = reason.replace(self._key, "***")
        status = getattr(error, "status_code", None)
        if status is None or status in _LATER or status >= 500:
            return EndpointUnavailable(
                f"no request succeeded ({reason[:300]})",
                where=self._recipe.base_url,
                remedy="check the endpoint; a restart continues the run",
            )
        return TitaError(
            f"refuses every request ({reason[:300]})",
            where=self._recipe.base_url,
            remedy=f"check {self._where}.model and the API key in {self._where}.key_env",
        )


class EndpointRanker:
    """Sends each question with its image and answers to a judge model, which scores the answers."""

    def __init__(self, recipe: EndpointRankerRecipe, *, seed: int) -> None:
        """Raises TitaError if the environment has no API key although the recipe names one.

        Args:
            seed: for the order in which the answers are shown.
        """
        self._recipe = recipe
        self._seed = seed
        self._endpoint = Endpoint(recipe, where="endpoint")

    def __call__(self, tasks: Sequence[RankingTask], /) -> list[Ranking]:
        """Rank the answers of all tasks.

        A request that fails drops its question, unless all fail.

        Raises:
            EndpointUnavailable: all requests failed, and later ones may succeed.
            TitaError: all requests failed.
        """
        with ThreadPoolExecutor(self._recipe.concurrency) as pool:
            outcomes = list(pool.map(self._rank, tasks))
        errors = [outcome for outcome in outcomes if isinstance(outcome, openai.APIError)]
        if tasks and len(errors) == len(tasks):
            raise self._endpoint.unavailable(errors[0])
        return [
            Ranking(failure="request failed", cost={"requests": self._recipe.orders})
            if isinstance(outcome, openai.APIError)
            else outcome
            for outcome in outcomes
        ]

    def _rank(self, task: RankingTask) -> Ranking | openai.APIError:
        order = list(range(len(task.answers)))
        seed = derive_seed(task.question.id, purpose="order", seed=self._seed)
        random.Random(seed).shuffle(order)
        cost = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
        found: list[list[float]] = [[] for _ in order]
        for shown in (order, order[::-1])[: self._recipe.orders]:
            reply = self._endpoint.complete(
                self._messages(task, shown), max_tokens=self._recipe.max_tokens, temperature=0
            )
            if isinstance(reply, openai.APIError):
                return reply
            cost["requests"] += 1
            if reply.usage is not None:
                cost["prompt_tokens"] += reply.usage.prompt_tokens
                cost["completion_tokens"] += reply.usage.completion_tokens
            text = reply.choices[0].message.content if reply.choices else None
            scores = parse_scores(text or "", number=len(shown))
            if scores is None:
                return Ranking(failure="no scores in the reply", cost=cost)
            for index, score in zip(shown, scores, strict=True):
                found[index].append(score)
        return Ranking(scores=tuple(map(fmean, found)), cost=cost)

    def _messages(self, task: RankingTask, shown: Sequence[int]) -> Any:
        earlier = "".join(f"[{turn.role}] {turn.text}\n" for turn in task.question.context)
        text = _PROMPT.format(
            criterion=self._recipe.criterion,
            question=f"{earlier and chr(10)}{earlier}{task.question.text}",
            answers="\n\n".join(
                f"Answer {place}: {task.answers[index]}" for place, index in enumerate(shown, 1)
            ),
            number=len(shown),
        )
        image = image_part(task.image, task.picture)
        return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


def parse_scores(reply: str, *, number: int) -> tuple[float, ...] | None:
    """The scores in the last JSON object of a judge's reply; None if it has not `number` of them.

    Scores outside of 1 to 10 are no scores.
    """
    for text in reversed(_REPLY.findall(reply)):
        try:
            scores = json.loads(text)["scores"]
        except (ValueError, KeyError):
            continue
        if (
            isinstance(scores, list)
            and len(scores) == number
            and all(isinstance(s, int | float) and not isinstance(s, bool) for s in scores)
            and all(math.isfinite(s) and 1 <= s <= 10 for s in scores)
        ):
            return tuple(map(float, scores))
        return None
    return None


def _read_key(recipe: EndpointRecipe, *, where: str) -> str | None:
    if recipe.key_env is None:
        return None
    if key := os.environ.get(recipe.key_env, "").strip():
        return key
    raise TitaError(
        f"the environment has no {recipe.key_env}, the API key of the endpoint",
        where=f"{where}.key_env",
        remedy="set it; on a cluster name a Secret with it in the chart's `jobs.extraEnvFrom`",
    )


def image_part(path: Path, picture: Image) -> dict[str, Any]:
    """The part of a message that shows an image, as a `data:` URL.

    Args:
        path: its file, which is sent as it is if endpoints usually read its format.
        picture: the decoded image, which is sent as PNG otherwise.
    """
    kind = _MEDIA_TYPES.get(path.suffix.lower())
    if kind is not None:
        data = read_image(path)
    else:
        file = io.BytesIO()
        picture.save(file, "png")
        kind, data = "png", file.getvalue()
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
