"""Asks models behind OpenAI-compatible endpoints, and ranks answers by a judge model there."""

import io
import json
import math
import os
import random
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import openai
from openai.types.chat import ChatCompletion
from PIL.Image import Image

from tita.activity import mark_progress
from tita.errors import ExitCode, TitaError
from tita.pairs.distort import derive_seed
from tita.pairs.ranking import Ranking, RankingTask
from tita.proxies import without_proxy
from tita.recipes import EndpointRankerRecipe, EndpointRecipe
from tita.storage.image_shards import read_image
from tita.vlm.chat_messages import data_url, image_part, media_type

_MEDIA_TYPES = ("image/jpeg", "image/png", "image/webp", "image/gif")
"""Of images that endpoints usually read."""
_REPLY = re.compile(r'\{[^{}]*"scores"[^{}]*\}')
_LATER = frozenset((408, 409, 429))
_NO_LIST = 501
"""Status of servers that implement chat completions only; others answer 404."""
_ABOUT_REQUEST = frozenset((400, 413, 422))
"""Status codes that may be about one question, such as one whose image is too large."""
_PROMPT = """\
Score answers to a question about the image by this criterion: {criterion}

Question: {question}

{answers}

Reply with one JSON object: {{"scores": [...]}}, with one number from 1 (worst) to 10 (best) for
each of the {number} answers, in their order. Only answers that are equally good have equal scores.
"""


_DIGEST_HEADER = "x-tita-model-digest"
"""Of the answers of `tita serve`; `/models` lists the same digest."""
_IDENTITY = ("digest", "root", "parent", "meta")
"""What lists of models tell beyond a name: of `tita serve`, vLLM and SGLang, and llama.cpp. The
field `created` is the time of the request in most of them."""


class EndpointUnavailable(TitaError):
    """The endpoint answers no request at the moment."""

    exit_code = ExitCode.RETRY


class ModelChanged(EndpointUnavailable):
    """The endpoint answers with another model than at the start of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The text of a chat completion, which may be empty, and what it cost."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    model: str = ""
    """Name and fingerprint of the model as the reply has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a request has no chat completion."""

    reason: str
    """Without the API key."""
    status: int | None = None
    """Of the HTTP response; None without one, or if its body is no chat completion."""


class Endpoint:
    """A client for one endpoint; several threads may use it."""

    def __init__(self, recipe: EndpointRecipe, *, where: str, digest: str | None = None) -> None:
        """Raises TitaError if the environment has no API key although the recipe names one.

        Args:
            recipe: address, model and limits.
            where: the recipe's key of it, for errors.
            digest: of the model of `tita serve`, if it is known; by default, of its first answer.
        """
        self._recipe = recipe
        self._where = where
        self._key = _read_key(recipe, where=where)
        self._has_answered = False
        self._digest = digest
        self._client = openai.OpenAI(
            base_url=recipe.base_url,
            # The client requires one.
            api_key=self._key or "none",
            timeout=recipe.timeout_s,
            max_retries=recipe.retries,
            http_client=openai.DefaultHttpxClient(mounts=without_proxy(recipe.base_url)),
        )

    def identity(self) -> dict[str, Any]:
        """What the endpoint tells of its model beyond the name; empty if nothing.

        Raises:
            EndpointUnavailable: it does not answer.
        """
        try:
            listed = self._client.models.with_raw_response.list()
            entries = json.loads(listed.text)["data"]
            entry = next(each for each in entries if each["id"] == self._recipe.model)
        except openai.APIConnectionError as error:
            raise self._unavailable(Failure(reason=self._reason(error))) from None
        except openai.APIStatusError as error:
            failure = Failure(reason=self._reason(error), status=error.status_code)
            if error.status_code in _LATER or (
                error.status_code >= 500 and error.status_code != _NO_LIST
            ):
                raise self._unavailable(failure) from None
            return {}
        except (openai.APIError, ValueError, KeyError, TypeError, StopIteration):
            return {}
        # A list of `tita serve` has the base model as `root`, and its digest covers all models.
        names = ("digest",) if entry.get("digest") else _IDENTITY
        return {name: entry[name] for name in names if entry.get(name)}

    def complete(self, messages: Any, **options: Any) -> Completion | Failure:
        """Ask once; failures that may pass are retried.

        Raises:
            ModelChanged: another model answers than before.
        """
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=self._recipe.model, messages=messages, **options
            )
            reply: Any = response.parse()
        except openai.APIError as error:
            return Failure(reason=self._reason(error), status=getattr(error, "status_code", None))
        except ValueError:  # a body that is declared as JSON and is none
            reply = None
        finally:
            mark_progress()
        # The client does not check the response: a gateway's page is a `str`.
        if not isinstance(reply, ChatCompletion) or not isinstance(reply.choices, list):
            return Failure(reason="a response that is no chat completion")
        self._check_digest(response.headers.get(_DIGEST_HEADER))
        self._has_answered = True
        message = reply.choices[0].message if reply.choices else None
        content: Any = message.content if message else None
        usage = reply.usage
        return Completion(
            text=_text_of(content),
            prompt_tokens=(usage.prompt_tokens if usage else None) or 0,
            completion_tokens=(usage.completion_tokens if usage else None) or 0,
            model=" ".join(str(each) for each in (reply.model, reply.system_fingerprint) if each),
        )

    def _check_digest(self, digest: str | None) -> None:
        if digest is None:
            return
        self._digest = self._digest or digest
        if digest != self._digest:
            raise ModelChanged(
                f"the model {self._recipe.model} changed while it was asked",
                where=self._recipe.base_url,
                remedy="a restart builds the batches of the old one again",
            )

    def check_answers(self, replies: Sequence[object]) -> None:
        """Check that not all requests of a batch have failed.

        Requests that the endpoint refuses because of what they ask may be all of a batch, the last
        one of which has few. They are no reason to end the run if others have succeeded.

        Raises:
            EndpointUnavailable: all failed, and later ones may succeed.
            TitaError: all failed.
        """
        failures = [reply for reply in replies if isinstance(reply, Failure)]
        if not failures or len(failures) < len(replies):
            return
        is_about_request = failures[0].status in _ABOUT_REQUEST
        if is_about_request and (self._has_answered or len(replies) == 1):
            return
        raise self._unavailable(failures[0])

    def _reason(self, error: openai.APIError) -> str:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return (reason.replace(self._key, "***") if self._key else reason)[:300]

    def _unavailable(self, failure: Failure) -> TitaError:
        status = failure.status
        if status is None or status in _LATER or status >= 500:
            return EndpointUnavailable(
                f"no request succeeded ({failure.reason})",
                where=self._recipe.base_url,
                remedy="check the endpoint; a restart continues the run",
            )
        return TitaError(
            f"refuses every request ({failure.reason})",
            where=self._recipe.base_url,
            remedy=f"check {self._where}.model and the API key in {self._where}.key_env",
        )


def _text_of(content: Any) -> str:
    """The text of a message; Mistral sends it, and reasoning, as a list of parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = (part.get("text") for part in parts if isinstance(part, dict))
    return "".join(text for text in texts if isinstance(text, str))


class EndpointRanker:
    """Sends each question with its image and answers to a judge model, which scores the answers."""

    def __init__(
        self, recipe: EndpointRankerRecipe, *, seed: int, digest: str | None = None
    ) -> None:
        """Raises TitaError if the environment has no API key although the recipe names one.

        Args:
            recipe: address, model and prompt.
            seed: for the order in which the answers are shown.
            digest: as of `Endpoint`.
        """
        self._recipe = recipe
        self._seed = seed
        self._endpoint = Endpoint(recipe, where="endpoint", digest=digest)

    def __call__(self, tasks: Sequence[RankingTask], /) -> list[Ranking]:
        """Rank the answers of all tasks.

        A request that fails drops its question, unless all fail.

        Raises:
            TitaError: all requests failed; see `Endpoint.check_answers`.
        """
        with ThreadPoolExecutor(self._recipe.concurrency) as pool:
            outcomes = list(pool.map(self._rank, tasks))
        self._endpoint.check_answers(outcomes)
        return [
            Ranking(failure="request failed", cost={"requests": self._recipe.orders})
            if isinstance(outcome, Failure)
            else outcome
            for outcome in outcomes
        ]

    def _rank(self, task: RankingTask) -> Ranking | Failure:
        order = list(range(len(task.answers)))
        seed = derive_seed(task.question.id, purpose="order", seed=self._seed)
        random.Random(seed).shuffle(order)
        cost = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
        found: list[list[float]] = [[] for _ in order]
        served_by: set[str] = set()
        for shown in (order, order[::-1])[: self._recipe.orders]:
            reply = self._endpoint.complete(
                self._messages(task, shown), max_tokens=self._recipe.max_tokens, temperature=0
            )
            if isinstance(reply, Failure):
                return reply
            cost["requests"] += 1
            cost["prompt_tokens"] += reply.prompt_tokens
            cost["completion_tokens"] += reply.completion_tokens
            served_by.add(reply.model)
            scores = parse_scores(reply.text, number=len(shown))
            if scores is None:
                return Ranking(
                    failure="no scores in the reply", cost=cost, served_by=frozenset(served_by)
                )
            for index, score in zip(shown, scores, strict=True):
                found[index].append(score)
        return Ranking(scores=tuple(map(fmean, found)), cost=cost, served_by=frozenset(served_by))

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
        # Not at a mark in the text: an answer may have one, too.
        image = image_part(image_url(task.image, task.picture))
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


def image_url(path: Path, picture: Image) -> str:
    """An image as a `data:` URL.

    Args:
        path: its file, which is sent as it is if endpoints usually read its format.
        picture: the decoded image, which is sent as PNG otherwise.
    """
    content = read_image(path)
    if media_type(content) not in _MEDIA_TYPES:
        file = io.BytesIO()
        picture.save(file, "png")
        content = file.getvalue()
    return data_url(content)
