"""Many questions: read from a file, answered in batches, written line by line, resumable.

The answers file is JSONL with LLaVA's keys: its evaluation scripts read `question_id`, `prompt`,
`text`, `answer_id`, `model_id` and `metadata` (`llava/eval/model_vqa_loader.py`); the rest is
added here.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tita.align.requests import Answer
from tita.data import Dataset, open_dataset
from tita.data.append_log import AppendLog, json_object
from tita.data.dataset import resolve_file, to_messages, write_image
from tita.data.row_cache import hold_images
from tita.data.row_values import ImageValue
from tita.data.rows import RawRow
from tita.errors import JobFailed, TitaError
from tita.infer.interactive import load_engine
from tita.infer.options import InferOptions
from tita.json_text import dump_json
from tita.records import IMAGE_SUFFIXES, ContextTurn
from tita.terminal import progress, say
from tita.vlm.model_set import digest_of

_MARKERS = ("question_id", "prompt", "text", "model_id", "metadata")
_DIGEST = "_sha256"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageQuestion:
    """One question, the turns before it, and their images."""

    id: Any
    """As in the file, number or text: scripts that read the answers look it up."""
    text: str
    images: tuple[Path, ...]
    context: tuple[ContextTurn, ...] = ()

    @property
    def prompt(self) -> str:
        """The question; with earlier turns, all messages as JSON."""
        if not self.context:
            return self.text
        messages = to_messages(self.context, self.text, num_images=len(self.images))
        return json.dumps(messages, ensure_ascii=False)


def questions_of(
    source: str, *, images: Path | None, ignore: Iterable[str] = ()
) -> list[ImageQuestion]:
    """The questions of a dataset in any layout, or of `-`, JSON Lines.

    Args:
        source: a file, a folder of such files, or `-` for standard input.
        images: the folder that image names are relative to; the file's own if not given.
        ignore: columns that are treated as absent.

    Raises:
        TitaError: there is no such file, a line is no question, or an id occurs twice.
    """
    dataset = (
        _standard_input(images or Path(), ignore=frozenset(ignore))
        if source == "-"
        else open_dataset(Path(source), images=images, ignore=ignore)
    )
    questions, seen = [], dict[str, str]()
    for row, example in dataset.examples():
        if example.id in seen:
            raise TitaError(
                f"question id {example.id} is already used in {seen[example.id]}",
                where=row.where,
                remedy="give every question its own id",
            )
        seen[example.id] = row.where
        questions.append(
            ImageQuestion(
                id=example.id if example.raw_id is None else example.raw_id,
                text=example.question,
                images=tuple(
                    dataset.images / dataset.resolve_image(image, row) for image in example.images
                ),
                context=example.context,
            )
        )
    if not questions:
        raise TitaError("no questions in it", where=source, remedy="write one object per line")
    name = "standard input" if source == "-" else Path(source).name
    say(f"{name}: {dataset.layouts.describe()}")
    return questions


def images_in(folder: Path, *, question: str) -> list[ImageQuestion]:
    """The same question about every image below a folder; the image's name is the id.

    Raises:
        TitaError: there is no image.
    """
    paths = sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in IMAGE_SUFFIXES
        # A store keeps other versions of a tree in hidden folders.
        and not any(part.startswith(".tita-") for part in p.relative_to(folder).parts)
    )
    if not paths:
        raise TitaError("no images in it", where=str(folder), remedy="name a folder of images")
    return [
        ImageQuestion(id=path.relative_to(folder).as_posix(), text=question, images=(path,))
        for path in paths
    ]


def answer_all(
    questions: Sequence[ImageQuestion],
    options: InferOptions,
    *,
    out: Path | None,
    batch_size: int,
    model_id: str | None = None,
) -> None:
    """Answer the questions, which have unique ids, that `out` has no answers to yet.

    Args:
        out: the answers file; standard output if not given, which cannot be resumed.
        batch_size: number of answers generated at the same time.
        model_id: the model's name in the answers; the base's if not given.

    Raises:
        JobFailed: some questions have no answer; the others do.
    """
    model_id = model_id or options.base
    metadata = options.describe()
    if out is not None:
        prompts = {str(each.id): each.prompt for each in questions}
        # A file of another kind is refused before the models are looked for.
        with AnswersFile(out, model_id=model_id, metadata=metadata, prompts=prompts):
            pass
        metadata |= _digests(options)
    with _writer(out, questions, model_id=model_id, metadata=metadata) as (done, write):
        left = [each for each in questions if str(each.id) not in done]
        if done:
            say(f"{len(questions) - len(left)} of {len(questions)} questions are answered already")
        failed = []
        for each, answer in _answers(left, options, batch_size=batch_size):
            write(answer_line(each, answer, model_id=model_id, metadata=metadata))
            if isinstance(answer, TitaError):
                failed.append((each, answer))
    if failed:
        first, error = failed[0]
        raise JobFailed(
            f"{len(failed)} of {len(questions)} questions have no answer "
            f"(first: {first.id}: {error})",
            where=None if out is None else str(out),
            remedy=None if out is None else "fix the questions and run again: only these are asked",
        )


def _digests(options: InferOptions) -> dict[str, str]:
    """By model: a name such as `reward/current` is that of another one after a promotion."""
    names = {"base": options.base, **options.all_rewards, "reference": options.reference}
    return {f"{role}{_DIGEST}": digest_of(name) for role, name in names.items() if name}


def answer_line(
    question: ImageQuestion,
    answer: Answer | TitaError,
    *,
    model_id: str,
    metadata: Mapping[str, Any],
) -> dict[str, Any]:
    """One line; a question without an answer has an empty text, and the reason in `error`."""
    # The same question with the same options has the same `answer_id`.
    identity = json.dumps((question.id, question.prompt, model_id, metadata), sort_keys=True)
    line = {
        "question_id": question.id,
        "prompt": question.prompt,
        "text": "" if isinstance(answer, TitaError) else answer.text,
        "answer_id": hashlib.sha256(identity.encode()).hexdigest()[:22],
        "model_id": model_id,
        "metadata": dict(metadata),
    }
    if len(question.images) == 1:
        line["image"] = question.images[0].name
    elif question.images:
        line["images"] = [image.name for image in question.images]
    if isinstance(answer, TitaError):
        return line | {"error": str(answer)}
    line |= {
        "finish_reason": answer.finish_reason,
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_new_tokens": len(answer.token_ids),
        "num_changed": answer.num_changed,
        "error": None,
    }
    if answer.tokens:
        line["tokens"] = [asdict(token) for token in answer.tokens]
    return line


class AnswersFile(AppendLog):
    """An answers file open for one writer; use it as a context manager.

    Opening it removes an incomplete last line, failed answers, and answers to questions that have
    changed since, or their images, so that these are asked again.

    Raises:
        TitaError: another writer has it open, its answers are of other models or options, or it is
            no answers file.
    """

    KIND = "answers file"

    def __init__(
        self,
        path: Path,
        *,
        model_id: str,
        metadata: Mapping[str, Any],
        prompts: Mapping[str, str],
        images: Mapping[str, Sequence[Path]] | None = None,
    ) -> None:
        """A missing file is created; `metadata` is common to all lines, the others are by id."""
        super().__init__(path, images=images)
        # As it is read back from the file.
        self._shared = json.loads(dump_json({"model_id": model_id, **metadata}))
        self._prompts = prompts

    def _parse(self, line: bytes) -> dict[str, Any] | None:
        record = json_object(line)
        return record if record is not None and all(key in record for key in _MARKERS) else None

    def _identity(self, record: Mapping[str, Any]) -> str | None:
        identity = str(record["question_id"])
        if record.get("error") or self._prompts.get(identity) != record["prompt"]:
            return None
        if self.has_other_images(record):
            return None
        return identity

    def _check(self, record: Mapping[str, Any], *, where: str) -> None:
        theirs = {"model_id": record["model_id"], **record["metadata"]}
        for key, value in self._shared.items():
            # Older files have no digests.
            is_known = key in theirs or not key.endswith(_DIGEST)
            if is_known and theirs.get(key) != value:
                raise TitaError(
                    f"holds answers with {key} {theirs.get(key)!r}, not {value!r}",
                    where=where,
                    remedy="choose another --out",
                )


def _answers(
    left: Sequence[ImageQuestion], options: InferOptions, *, batch_size: int
) -> Iterator[tuple[ImageQuestion, Answer | TitaError]]:
    if not left:
        return
    engine = load_engine(options)
    requests = (options.request(each.text, each.images, context=each.context) for each in left)
    num_failed = num_changed = num_tokens = 0
    with progress("answering", total=len(left), unit="questions") as advance:
        for number, answer in engine.generate_as_completed(requests, batch_size=batch_size):
            yield left[number], answer
            if isinstance(answer, TitaError):
                num_failed += 1
            else:
                num_changed += answer.num_changed
                num_tokens += len(answer.token_ids)
            advance(note=f"{num_failed} failed" if num_failed else "")
    share = f", {num_changed / num_tokens:.1%} of the tokens changed" if num_tokens else ""
    say(f"answered {len(left) - num_failed} of {len(left)} questions{share}")


@contextmanager
def _writer(
    out: Path | None,
    questions: Sequence[ImageQuestion],
    *,
    model_id: str,
    metadata: Mapping[str, Any],
) -> Iterator[tuple[set[str], Callable[[Mapping[str, Any]], None]]]:
    """The ids that are answered already, and a function that writes a line.

    Answers come as they are completed; LLaVA's scripts go by their order, so at the end they are in
    the order of the questions.
    """
    prompts = {str(each.id): each.prompt for each in questions}
    ids = list(prompts)
    if out is not None:
        images = {str(each.id): each.images for each in questions}
        with AnswersFile(
            out, model_id=model_id, metadata=metadata, prompts=prompts, images=images
        ) as file:
            yield set(file.done), file.append
            file.sort_by_question(ids)
        return
    held: dict[str, str] = {}
    waiting = iter(ids)
    following = next(waiting, None)

    def write(line: Mapping[str, Any]) -> None:
        nonlocal following
        held[str(line["question_id"])] = dump_json(line, ensure_ascii=False)
        while following in held:
            print(held.pop(following), flush=True)
            following = next(waiting, None)

    yield set(), write


def _standard_input(images: Path, *, ignore: frozenset[str]) -> Dataset:
    rows = (
        RawRow(where=f"standard input:{n}", file=Path("-"), id=f"standard input:{n}", content=line)
        for n, line in enumerate(sys.stdin.buffer, start=1)
        if line.strip()
    )

    def resolve(image: ImageValue, row: RawRow) -> str:
        if isinstance(image, bytes):
            cache = hold_images()
            return str(cache / write_image(image, into=cache))
        return resolve_file(image, row, images=images)

    return Dataset(rows=rows, path=Path("-"), images=images, resolve_image=resolve, ignore=ignore)
