"""Teachers of `strategy=teacher`: another model, here or behind an OpenAI-compatible endpoint."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL.Image import Image

from tita.align import Engine
from tita.data.image_table import image_file
from tita.pairs.build import BaseAnswers, PairsRun
from tita.pairs.endpoint import Completion, Endpoint, Failure, image_url
from tita.pairs.taught import BetterAnswers
from tita.recipes import TeacherEndpointRecipe
from tita.records import Question
from tita.vlm.chat_messages import chat_messages
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
        digest = run.endpoint.get("digest")
        self._endpoint = Endpoint(recipe, where="teacher.endpoint", digest=digest)

    def __call__(
        self, questions: Sequence[Question], pictures: Sequence[Image], /
    ) -> BetterAnswers:
        """Ask about all questions.

        A request that fails drops its question, unless all fail.

        Raises:
            TitaError: all requests failed; see `Endpoint.check_answers`.
        """
        with ThreadPoolExecutor(self._recipe.concurrency) as pool:
            replies = list(pool.map(self._ask, questions, pictures))
        self._endpoint.check_answers(replies)
        cost = Counter({"requests": len(replies)})
        answers, num_failed, served_by = [], 0, set()
        for reply in replies:
            if isinstance(reply, Failure):
                answers.append("")
                num_failed += 1
                continue
            cost["prompt_tokens"] += reply.prompt_tokens
            cost["completion_tokens"] += reply.completion_tokens
            served_by.add(reply.model)
            answers.append(reply.text)
        dropped = Counter({"teacher: request failed": num_failed} if num_failed else {})
        return BetterAnswers(
            answers=answers, dropped=dropped, cost=cost, served_by=frozenset(served_by)
        )

    def _ask(self, question: Question, picture: Image) -> Completion | Failure:
        url = image_url(image_file(self._run.images, str(question.image)), picture)
        messages = chat_messages(question.context, question.text, [url])
        recipe = self._run.recipe
        return self._endpoint.complete(
            messages,
            max_tokens=recipe.max_new_tokens,
            temperature=recipe.temperature,
            extra_body=dict(self._recipe.extra_body),
        )
