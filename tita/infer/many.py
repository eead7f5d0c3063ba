"""Many questions: answered in batches, written line by line, carried on after a stop."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tita.align import Engine
from tita.errors import JobFailed, TitaError
from tita.infer.answers_file import AnswersFile, answer_line
from tita.infer.asking import Asking
from tita.infer.questions import Asked
from tita.terminal import progress, say

Write = Callable[[Mapping[str, Any]], None]


def answer_all(
    asked: Sequence[Asked],
    asking: Asking,
    *,
    out: Path | None,
    batch_size: int,
    model_id: str | None = None,
) -> None:
    """Answer what `out` does not hold yet.

    Args:
        asked: the questions.
        asking: how.
        out: the answers file; standard output if not given, which cannot be carried on.
        batch_size: answers written at once.
        model_id: what the answers call the model; the base's name if not given.

    Raises:
        JobFailed: questions have no answer; the others have.
    """
    model_id = model_id or asking.base
    metadata = asking.describe()
    with _writing(out, asked, model_id=model_id, metadata=metadata) as (done, write, finish):
        left = [each for each in asked if str(each.id) not in done]
        if done:
            say(f"{len(asked) - len(left)} of {len(asked)} questions are answered already")
        failed = []
        for each, answer in _answers(left, asking, batch_size=batch_size):
            write(answer_line(each, answer, model_id=model_id, metadata=metadata))
            if isinstance(answer, TitaError):
                failed.append((each, answer))
        finish()
    if failed:
        first, error = failed[0]
        raise JobFailed(
            f"{len(failed)} of {len(asked)} questions have no answer (first: {first.id}: {error})",
            where=None if out is None else str(out),
            remedy=None if out is None else "mend them and run again: only they are asked",
        )


def _answers(
    left: Sequence[Asked], asking: Asking, *, batch_size: int
) -> Iterator[tuple[Asked, Any]]:
    if not left:
        return
    engine: Engine = asking.load()
    requests = (
        asking.request(each.text, [] if each.image is None else [each.image]) for each in left
    )
    num_failed = num_changed = num_tokens = 0
    with progress("answering", total=len(left), unit="questions") as advance:
        for place, answer in engine.generate_as_completed(requests, batch_size=batch_size):
            yield left[place], answer
            if isinstance(answer, TitaError):
                num_failed += 1
            else:
                num_changed += answer.num_changed
                num_tokens += len(answer.token_ids)
            advance(note=f"{num_failed} failed" if num_failed else "")
    share = f", {num_changed / num_tokens:.1%} of the tokens changed" if num_tokens else ""
    say(f"answered {len(left) - num_failed} of {len(left)} questions{share}")


@contextmanager
def _writing(
    out: Path | None, asked: Sequence[Asked], *, model_id: str, metadata: Mapping[str, Any]
) -> Iterator[tuple[set[str], Write, Callable[[], None]]]:
    """What is answered already, where lines go, and what to do behind the last.

    Answers come as they are done; LLaVA's scripts go by their place, so they end in the order of
    the questions.
    """
    if out is None:
        held = _Ordered([str(each.id) for each in asked])
        yield set(), held.write, lambda: None
        return
    prompts = {str(each.id): each.text for each in asked}
    with AnswersFile(out, model_id=model_id, metadata=metadata, prompts=prompts) as file:
        ids = list(prompts)
        yield set(file.done), file.append, lambda: file.sort_by_question(ids)


class _Ordered:
    """Prints lines in the order of their questions, each as soon as those before it are there."""

    def __init__(self, ids: Sequence[str]) -> None:
        self._ids = list(ids)
        self._held: dict[str, str] = {}
        self._next = 0

    def write(self, line: Mapping[str, Any]) -> None:
        self._held[str(line["question_id"])] = json.dumps(line, ensure_ascii=False)
        while self._next < len(self._ids) and self._ids[self._next] in self._held:
            print(self._held.pop(self._ids[self._next]), flush=True)
            self._next += 1
