"""The layouts of dataset rows, and the one reader that every command uses.

A layout is recognised from the columns of a row and converted to `Example`s. A row is read
completely or refused: a column with a value that its layout does not use is an error.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tita.data import column_names as names
from tita.data.cells import parse_structure
from tita.data.choices import read_choices
from tita.data.dialogues import (
    ChatMessage,
    is_assistant,
    is_dialogue,
    parse_dialogue,
    read_answer,
    read_dialogue,
    read_history,
    read_turns,
)
from tita.data.row_values import ImageValue, RowValues
from tita.data.rows import RawRow
from tita.records import ContextTurn


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One question of a row, or one preference pair, the same for every command."""

    layout: str
    """Name of the row's layout."""
    id: str
    raw_id: str | int | None
    """The id with its JSON type; None if it does not stand in the row."""
    context: tuple[ContextTurn, ...]
    question: str
    images: tuple[ImageValue, ...]
    """As the row has them, in the order of the turns that show them."""
    chosen: str | None = None
    rejected: str | None = None
    """Both are None for a question."""
    rejected_image: ImageValue | None = None
    """Of a pair: an image under which the chosen answer is a worse one."""
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    metric: str | None = None
    suite: str | None = None
    category: str | None = None
    group: str | None = None

    @property
    def is_pair(self) -> bool:
        """Whether it is a preference pair."""
        return self.chosen is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A row's conversation and answers, before images and marks are read."""

    messages: Sequence[ChatMessage]
    column: str
    """Where the conversation stands."""
    pairs: Sequence[tuple[str, str]] | None = None
    """Chosen and rejected answers; None for questions."""
    references: tuple[str, ...] = names.REFERENCES
    """Columns of reference answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One layout of rows."""

    name: str
    matches: Callable[[RowValues], bool]
    read: Callable[[RowValues], _Draft]


def read_examples(
    row: RawRow, *, ignore: frozenset[str] = frozenset(), urls: bool = False
) -> tuple[Example, ...]:
    """Convert a row to its examples: one, except for conversations and rated completions.

    A conversation has one question per answer in it, each with the turns before it as context.
    Rated completions have one pair for every two that are rated differently.

    Args:
        row: the row.
        ignore: columns that are treated as absent.
        urls: return http(s) URLs of images as `ImageURL`; otherwise such a row is an error.

    Raises:
        TitaError: the row has no known layout, a value is invalid, or a column is not used.
    """
    values = RowValues.parse(row, ignore=ignore, urls=urls)
    _check_no_rows_inside(values)
    layout = next(layout for layout in LAYOUTS if layout.matches(values))
    draft = layout.read(values)
    images = values.images()
    identity, raw_id = values.id()
    shared: dict[str, Any] = {column: values.label(column) for column in names.BENCHMARK}
    if draft.pairs is None:
        shared["choices"] = read_choices(values)
    else:
        shared["rejected_image"] = values.rejected_image()
    examples = (_to_pairs if draft.pairs is not None else _to_questions)(values, draft, images)
    values.check_all_used(layout.name, has_images=bool(images))
    return tuple(
        Example(
            layout=layout.name,
            id=identity if len(examples) == 1 else f"{identity}#{number}",
            raw_id=raw_id if len(examples) == 1 else None,
            **example,
            **shared,
        )
        for number, example in enumerate(examples, start=1)
    )


def _check_no_rows_inside(row: RowValues) -> None:
    """Check that the row is no whole dataset, as the published files of VQAv2 and TextVQA are.

    Nor a list of datasets, as the `meta.json` of MMPR and of InternVL's training is.
    """
    entries = list(row.values.values())
    if entries and all(isinstance(each, Mapping) and "annotation" in each for each in entries):
        raise row.error(
            f"a list of datasets: {', '.join(map(repr, list(row.values)[:3]))}",
            f"name one of their files, such as {entries[0]['annotation']}, and its `root` as the "
            "folder of images",
        )
    for column in ("questions", "data", "annotations"):
        inner = row.values.get(column)
        if isinstance(inner, list) and inner and isinstance(inner[0], Mapping):
            raise row.error(
                f"a dataset in one object: its rows are in {column!r}",
                "write them as lines, or convert the file with `tita-bench prepare`",
            )


def _to_pairs(
    row: RowValues, draft: _Draft, images: tuple[ImageValue, ...]
) -> list[dict[str, Any]]:
    *context, last = read_turns(row, draft.messages, num_images=len(images), column=draft.column)
    prompt = {"context": tuple(context), "question": last.text, "images": images}
    return [
        {**prompt, "chosen": chosen, "rejected": rejected} for chosen, rejected in draft.pairs or ()
    ]


def _to_questions(
    row: RowValues, draft: _Draft, images: tuple[ImageValue, ...]
) -> list[dict[str, Any]]:
    messages, answer = draft.messages, None
    if messages and messages[-1].role == "assistant":
        answer = read_answer(row, messages[-1].text, draft.column)
        messages = messages[:-1]
    turns = read_turns(row, messages, num_images=len(images), column=draft.column)
    last = {
        "context": turns[:-1],
        "question": turns[-1].text,
        "images": images,
        "references": row.references(answer, columns=draft.references),
    }
    if answer is None:
        return [last]
    asked = [n for n, turn in enumerate(turns[:-1]) if turn.role == "user"]
    return [
        {
            "context": turns[:n],
            "question": turns[n].text,
            "images": images[: sum(turn.num_images for turn in turns[: n + 1])],
            "references": (turns[n + 1].text,),
        }
        for n in asked
    ] + [last]


# Prompts and answers


def _preamble(row: RowValues) -> list[ChatMessage]:
    """System prompt and history, where they have their own columns."""
    messages = []
    if row.has(*names.SYSTEM):
        column, text = row.take(*names.SYSTEM, what="system prompt")
        messages.append(ChatMessage(role="system", text=row.text(text, column)))
    if row.has("history"):
        _, value = row.take("history", what="history")
        messages += read_history(row, value)
    return messages


def _join(row: RowValues, dialogue: list[ChatMessage], column: str) -> list[ChatMessage]:
    """The dialogue after the preamble; a system prompt may stand in one place."""
    preamble = _preamble(row)
    if preamble and dialogue and dialogue[0].role == "system":
        if preamble != dialogue[:1]:
            what = f"'system' or 'history' beside a system message in {column!r}"
            raise row.error(what, "keep one of them")
        preamble = []
    return preamble + dialogue


def _dialogue(row: RowValues, *columns: str) -> tuple[str, list[ChatMessage]]:
    column, value = row.take(*columns, what="conversation")
    return column, read_dialogue(row, value, column)


def _question(row: RowValues, column: str, value: Any) -> list[ChatMessage]:
    """A question as text or as messages."""
    value = parse_dialogue(value)
    if is_dialogue(value):
        return read_dialogue(row, value, column)
    text = row.text(value, column)
    if not isinstance(parse_structure(text), str):
        what = f"{column!r} is JSON, not a question"
        raise row.error(what, "write its fields as columns")
    return [ChatMessage(role="user", text=text)]


def _answer(row: RowValues, column: str, value: Any) -> tuple[list[ChatMessage], str]:
    """The prompt in front of an answer, if the column holds both, and the answer."""
    value = parse_dialogue(value)
    if not is_dialogue(value):
        return [], read_answer(row, row.text(value, column), column)
    return _split_answer(row, read_dialogue(row, value, column), column)


def _split_answer(
    row: RowValues, messages: list[ChatMessage], column: str
) -> tuple[list[ChatMessage], str]:
    if not messages or messages[-1].role != "assistant":
        what = f"{column!r} does not end with an assistant message"
        raise row.error(what, "end it with the answer")
    return messages[:-1], read_answer(row, messages[-1].text, column)


def _compare(row: RowValues, chosen: str, rejected: str) -> tuple[str, str]:
    if chosen.split() == rejected.split():
        raise row.error("chosen and rejected are the same", "fix or delete the line")
    return chosen, rejected


def _different_prompts(row: RowValues) -> Exception:
    return row.error("chosen and rejected answer different prompts", "delete the line")


# Readers of layouts


def _read_pair(row: RowValues) -> _Draft:
    """A prompt and the columns `chosen` and `rejected`, each as text or messages."""
    chosen_column, value = row.take("chosen", what="better answer")
    own, chosen = _answer(row, chosen_column, value)
    num_inline = len(row.inline_images)
    rejected_column, value = row.take(*names.REJECTED, what="worse answer")
    other, rejected = _answer(row, rejected_column, value)
    # With an implicit prompt, its images stand in both columns.
    if row.inline_images[num_inline:] == row.inline_images[:num_inline]:
        del row.inline_images[num_inline:]
    if own != other:
        raise _different_prompts(row)
    column, messages = _pair_prompt(row, implicit=own)
    if own and own not in (messages, messages[-len(own) :]):
        raise _different_prompts(row)
    return _Draft(
        messages=_join(row, messages, column),
        column=column,
        pairs=[_compare(row, chosen, rejected)],
    )


def _pair_prompt(row: RowValues, *, implicit: list[ChatMessage]) -> tuple[str, list[ChatMessage]]:
    """The messages that both answers continue, and their column."""
    if row.has(*names.CONVERSATION):
        column, messages = _dialogue(row, *names.CONVERSATION)
        if row.has(*names.QUESTION):
            what = f"{row.find(names.QUESTION)!r} beside {column!r}"
            raise row.error(what, f"keep one of them, or give --ignore-column {column}")
        return column, messages
    if row.has("instruction"):
        return _instruction(row)
    if implicit and not row.has(*names.QUESTION):
        return "chosen", implicit
    column, value = row.take(*names.QUESTION, what="question")
    return column, _question(row, column, value)


def _instruction(row: RowValues) -> tuple[str, list[ChatMessage]]:
    """Alpaca's `instruction` and `input`, joined as LLaMA-Factory joins them."""
    column, value = row.take("instruction", what="question")
    text = row.text(value, column)
    if row.has("input"):
        _, more = row.take("input", what="input")
        text = f"{text}\n{row.text(more, 'input')}"
    return column, _question(row, column, text)


def _read_rlhf_v(row: RowValues) -> _Draft:
    """One JSON text with question and answers."""
    _, text = row.take("text", what="question and answers")
    fields = parse_structure(text)
    if fields.keys() != {"question", "chosen", "rejected"}:
        what = f"'text' is JSON with {', '.join(map(repr, fields)) or 'no fields'}"
        raise row.error(what, 'write {"question": ..., "chosen": ..., "rejected": ...}')
    for name, value in fields.items():
        row.text(value, name)
    answers = (read_answer(row, fields[name], name) for name in ("chosen", "rejected"))
    return _Draft(
        messages=_join(row, _question(row, "question", fields["question"]), "text"),
        column="text",
        pairs=[_compare(row, *answers)],
    )


def _read_two_dialogues(row: RowValues) -> _Draft:
    """Two conversations that differ in their last answer."""
    column, messages = _dialogue(row, *names.CONVERSATION)
    num_inline = len(row.inline_images)
    other_column, other_messages = _dialogue(row, "rejected_conversations", "rejected_messages")
    prompt, chosen = _split_answer(row, messages, column)
    other, rejected = _split_answer(row, other_messages, other_column)
    del row.inline_images[num_inline:]
    if other and prompt != other:
        raise _different_prompts(row)
    if row.has("rejected_images"):
        _, images = row.take("rejected_images", what="images")
        if images not in (row.values.get("images"), [row.values.get("image")]):
            what = "'rejected_images' are not the images of the row"
            raise row.error(what, "use rows whose answers are about the same image")
    return _Draft(
        messages=_join(row, prompt, column), column=column, pairs=[_compare(row, chosen, rejected)]
    )


def _read_rejected_response(row: RowValues) -> _Draft:
    """A conversation that ends with the chosen answer, and the rejected one (ms-swift)."""
    rejected_column, value = row.take("rejected_response", what="worse answer")
    rejected = read_answer(row, row.text(value, rejected_column), rejected_column)
    if row.has(*names.CONVERSATION):
        column, messages = _dialogue(row, *names.CONVERSATION)
        prompt, chosen = _split_answer(row, messages, column)
    else:
        column, value = row.take(*names.QUESTION, what="question")
        prompt = _question(row, column, value)
        _, answer = row.take("response", what="better answer")
        chosen = read_answer(row, row.text(answer, "response"), "response")
    return _Draft(
        messages=_join(row, prompt, column), column=column, pairs=[_compare(row, chosen, rejected)]
    )


def _read_compared_outputs(row: RowValues) -> _Draft:
    """A conversation, two outputs and the number of the better one (LLaVA-RLHF).

    An output takes the place of the conversation's last answer:
    https://github.com/llava-rlhf/LLaVA-RLHF/blob/main/RLHF/data_utils/data_utils_rm.py
    """
    column, value = row.take(*names.CONVERSATION, what="conversation")
    messages = parse_dialogue(value)
    if isinstance(messages, list) and len(messages) > 1 and is_assistant(messages[-1]):
        messages = messages[:-1]
    prompt = _join(row, read_dialogue(row, messages, column), column)
    outputs = []
    for name in ("output_1", "output_2"):
        _, output = row.take(name, what="output")
        output = parse_structure(output)
        if isinstance(output, Mapping):  # of a role that is a model's name
            output = output.get("value") or output.get("content")
        outputs.append(read_answer(row, row.text(output, name), name))
    _, preference = row.take("preference", what="number of the better output, 1 or 2")
    if (better := str(preference).removesuffix(".0")) not in ("1", "2"):
        what = f"'preference' is {preference!r}, not the number of an output"
        raise row.error(what, "write 1 or 2, or delete the line if neither is better")
    chosen, rejected = outputs if better == "1" else outputs[::-1]
    return _Draft(messages=prompt, column=column, pairs=[_compare(row, chosen, rejected)])


def _read_openai_preference(row: RowValues) -> _Draft:
    """The messages of `input`, and a message for each of the two outputs.

    https://developers.openai.com/api/docs/guides/direct-preference-optimization
    """
    column, given = row.take("input", what="object with the messages")
    given = parse_structure(given)
    if not isinstance(given, Mapping):
        raise row.error("'input' is not an object", 'write {"messages": [...]}')
    unused = [name for name, value in given.items() if value and name not in _OPENAI_INPUT]
    if unused:
        what = f"'input' contains {unused[0]!r}, which is not used"
        raise row.error(what, "keep only messages")
    prompt = read_dialogue(row, given.get("messages"), column)
    answers = []
    for name in ("preferred_output", "non_preferred_output"):
        _, output = row.take(name, what="list of one message")
        own, answer = _answer(row, name, output)
        if own:
            what = f"{name!r} has {len(own) + 1} messages"
            raise row.error(what, "keep one, the answer, and move those before it to 'input'")
        answers.append(answer)
    return _Draft(messages=prompt, column=column, pairs=[_compare(row, *answers)])


_OPENAI_INPUT = ("messages", "parallel_tool_calls")


def _read_rated(row: RowValues) -> _Draft:
    """Completions with ratings; every two with different mean ratings are a pair, as in Silkie."""
    column, value = row.take(*names.QUESTION, what="question")
    messages = _join(row, _question(row, column, value), column)
    _, value = row.take("completions", what="completions")
    rated = [(_mean_rating(row, each), each) for each in _completions(row, value)]
    answers = [
        read_answer(row, row.text(each.get("response"), "response"), "completions")
        for _, each in rated
    ]
    pairs = []
    for one, other in itertools.combinations(range(len(rated)), 2):
        first, second = rated[one][0], rated[other][0]
        if first is None or second is None or first == second:
            continue
        better, worse = (one, other) if first > second else (other, one)
        if answers[better].split() != answers[worse].split():
            pairs.append((answers[better], answers[worse]))
    return _Draft(messages=messages, column=column, pairs=pairs)


def _completions(row: RowValues, value: Any) -> list[Mapping[str, Any]]:
    """As a list of objects; the `datasets` library stores one object of lists."""
    value = parse_structure(value)
    if isinstance(value, Mapping) and value:
        lists = list(value.values())
        if all(isinstance(each, list) and len(each) == len(lists[0]) for each in lists):
            value = [dict(zip(value, each, strict=True)) for each in zip(*lists, strict=True)]
    if not (isinstance(value, list) and all(isinstance(each, Mapping) for each in value)):
        raise row.error(
            "'completions' is not a list of objects", "write objects with response and annotations"
        )
    for each in value:
        unknown = [k for k, v in each.items() if v and k not in _COMPLETION_KEYS]
        if unknown:
            what = f"'completions' contains {unknown[0]!r}, which is not used"
            raise row.error(what, "keep response, annotations and model")
    return value


_COMPLETION_KEYS = ("response", "annotations", "model")


def _mean_rating(row: RowValues, completion: Mapping[str, Any]) -> float | None:
    """Mean over the rated aspects; None if an aspect was not rated (`N/A`)."""
    annotations = completion.get("annotations")
    ratings = []
    for aspect in annotations.values() if isinstance(annotations, Mapping) else ():
        if aspect is None:  # Arrow's value of an aspect that other rows have
            continue
        rating = aspect.get("Rating") if isinstance(aspect, Mapping) else None
        if rating == "N/A":
            return None
        try:
            ratings.append(float(rating))  # type: ignore[arg-type]
        except (TypeError, ValueError):
            ratings.clear()
            break
    if not ratings or not all(map(math.isfinite, ratings)):
        what = "a completion without ratings, or with one that is no number"
        raise row.error(what, 'write "annotations": {"<aspect>": {"Rating": "4"}, ...}')
    return statistics.fmean(ratings)


def _read_conversation(row: RowValues) -> _Draft:
    """A conversation: every answer in it is the reference of a question."""
    column, messages = _dialogue(row, *names.CONVERSATION)
    if row.has(*names.QUESTION):
        what = f"{row.find(names.QUESTION)!r} beside {column!r}"
        raise row.error(what, f"keep one of them, or give --ignore-column {column}")
    return _Draft(messages=_join(row, messages, column), column=column)


def _read_instruction(row: RowValues) -> _Draft:
    column, messages = _instruction(row)
    return _Draft(messages=_join(row, messages, column), column=column, references=("output",))


def _read_query(row: RowValues) -> _Draft:
    column, value = row.take(*names.QUESTION, what="question")
    messages = _join(row, _question(row, column, value), column)
    return _Draft(messages=messages, column=column, references=("response",))


def _read_question(row: RowValues) -> _Draft:
    column, value = row.take(*names.QUESTION, what="question")
    return _Draft(messages=_join(row, _question(row, column, value), column), column=column)


# The table. The first layout that matches is taken.


def _has(*groups: str | tuple[str, ...]) -> Callable[[RowValues], bool]:
    """Matches rows with a value in one column of every group."""
    wanted = [(group,) if isinstance(group, str) else group for group in groups]
    return lambda row: all(row.has(*group) for group in wanted)


def _is_rlhf_v(row: RowValues) -> bool:
    fields = parse_structure(row.values.get("text"))
    return isinstance(fields, Mapping) and bool(fields.keys() & {"chosen", "rejected", "question"})


def _holds_messages(column: str) -> Callable[[RowValues], bool]:
    return lambda row: _is_pair(row) and is_dialogue(parse_dialogue(row.values.get(column)))


_is_pair = _has(("chosen", *names.REJECTED))


def _has_answer_objects(*groups: str | tuple[str, ...]) -> Callable[[RowValues], bool]:
    matches = _has("question", "answers", *groups)

    def check(row: RowValues) -> bool:
        answers = parse_structure(row.values.get("answers"))
        return matches(row) and isinstance(answers, list) and is_dialogue(answers)

    return check


def _stores_images(row: RowValues) -> bool:
    cells = [row.values.get(column) for column in ("image", "images", "image_1", "decoded_image")]
    return row.has("question") and any(isinstance(c, bytes) or is_dialogue(c) for c in cells)


def _pair_with(*groups: str | tuple[str, ...]) -> Callable[[RowValues], bool]:
    matches = _has(*groups)
    return lambda row: _is_pair(row) and matches(row)


def _is_mmpr(row: RowValues) -> bool:
    """Pairs of tita have the same columns, and no mark of the image in the question."""
    return _mmpr_columns(row) and "<image>" in str(row.values["question"])


_mmpr_columns = _pair_with("question", "rejected", "image")


LAYOUTS: tuple[Layout, ...] = (
    Layout(name="VLFeedback", matches=_has("completions"), read=_read_rated),
    Layout(name="POVID", matches=_has("rejected_conversations"), read=_read_two_dialogues),
    Layout(
        name="LLaVA-RLHF",
        matches=_has(names.CONVERSATION, "output_1", "output_2"),
        read=_read_compared_outputs,
    ),
    Layout(
        name="OpenAI preference",
        matches=_has(("preferred_output", "non_preferred_output")),
        read=_read_openai_preference,
    ),
    Layout(name="ms-swift", matches=_has("rejected_messages"), read=_read_two_dialogues),
    Layout(name="ms-swift", matches=_has("rejected_response"), read=_read_rejected_response),
    Layout(name="ShareGPT preference", matches=_pair_with(names.CONVERSATION), read=_read_pair),
    Layout(name="RLHF-V", matches=_is_rlhf_v, read=_read_rlhf_v),
    Layout(name="TRL conversational", matches=_holds_messages("prompt"), read=_read_pair),
    Layout(name="Alpaca preference", matches=_pair_with("instruction"), read=_read_pair),
    Layout(
        name="RLAIF-V",
        matches=_pair_with("question", ("ds_name", "origin_dataset", "image_path")),
        read=_read_pair,
    ),
    Layout(name="MMPR", matches=_is_mmpr, read=_read_pair),
    Layout(name="TRL", matches=_pair_with("prompt"), read=_read_pair),
    Layout(name="pair", matches=_pair_with(names.QUESTION), read=_read_pair),
    Layout(name="TRL implicit prompt", matches=_holds_messages("chosen"), read=_read_pair),
    Layout(name="pair", matches=_is_pair, read=_read_pair),
    Layout(name="conversation", matches=_has(names.CONVERSATION), read=_read_conversation),
    Layout(name="Alpaca", matches=_has("instruction"), read=_read_instruction),
    Layout(name="ms-swift query", matches=_has("query", "response"), read=_read_query),
    Layout(
        name="VQAv2",
        matches=_has_answer_objects(("question_id", "image_id", "multiple_choice_answer")),
        read=_read_question,
    ),
    Layout(name="VizWiz", matches=_has_answer_objects("image"), read=_read_question),
    Layout(name="lmms-lab", matches=_stores_images, read=_read_question),
    Layout(name="question", matches=lambda _: True, read=_read_question),
)
