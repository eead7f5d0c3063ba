"""Teachers of `strategy=teacher`: another model, here or behind an OpenAI-compatible endpoint."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
from PIL.Image import Image

from tita.align import Engine
from tita.data.image_table import image_file
from tita.pairs.build import BaseAnswers, PairsRun
from tita.pairs.endpoint import Endpoint, image_part
from tita.pairs.taught import BetterAnswers
from tita.recipes import TeacherEndpointRecipe
from tita.records import Question
from tita.vlm.loading import VLM, Models


class ModelTeacher:
    """Another model in this process, asked as the base model is."""

    def __init__(self, run: PairsRun, *, model: VLM) -> None:
        self._answers = BaseAnswers(run, base=model, engine=Engine(Models(model)))

    def __call__(
        self, questions: Sequence[Question], pictures: Sequence[Image], /
    ) -> BetterAnswers:
        """Raises TitaError if a question is invalid."""
        return BetterAnswers(answers=self._answers.answer(questions, pictures))


class EndpointTeacher:
    """A model behind an endpoint, which gets each question with its image and context."""

    def __init__(self, run: PairsRun, recipe: TeacherEndpointRecipe) -> None:
        """Raises TitaError if the environment has no API key although the recipe names one."""
        self._run = run
        self._recipe = recipe
        self._endpoint = Endpoint(recipe, where="teacher.endpoint")

    def __call__(
        self, questions: Sequence[Question], pictures: Sequence[Image], /
    ) -> BetterAnswers:
        """Ask about all questions.

        A request that fails drops its question, unless all fail.

        Raises:
            EndpointUnavailable: all requests failed, and later ones may succeed.
            TitaError: all requests failed.
        """
        with ThreadPoolExecutor(self._recipe.concurrency) as pool:
            replies = list(pool.map(self._ask, questions, pictures))
        errors = [reply for reply in replies if isinstance(reply, openai.APIError)]
        if questions and len(errors) == len(questions):
            raise self._endpoint.unavailable(errors[0])
        cost: Counter[str] = Counter()
        answers = []
        for reply in replies:
            cost["requests"] += 1
            if isinstance(reply, openai.APIError):
                answers.append("")
                continue
            if reply.usage is not None:
                cost["prompt_tokens"] += reply.usage.prompt_tokens
                cost["completion_tokens"] += reply.usage.completion_tokens
            answers.append((reply.choices[0].message.content if reply.choices else "") or "")
        dropped = Counter({"teacher: request failed": len(errors)} if errors else {})
        return BetterAnswers(answers=answers, dropped=dropped, cost=cost)

    def _ask(self, question: Question, picture: Image) -> Any:
        image = image_part(image_file(self._run.images, str(question.image)), picture)
        turns = [(turn.role, turn.text) for turn in question.context] + [("user", question.text)]
        messages: list[dict[str, Any]] = [
            {"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns
        ]
        messages[0]["content"].insert(0, image)
        recipe = self._run.recipe
        return self._endpoint.complete(
            messages,
            max_tokens=recipe.max_new_tokens,
            temperature=recipe.temperature,
            extra_body=dict(self._recipe.extra_body),
        )
