"""A results file as columns, for reports on millions of lines.

The lines are read one by one. Of each only numbers are kept, a few dozen bytes, and its offset in
the file, so that the few answers that a gallery shows can be read again.
"""

import contextlib
import itertools
import json
from array import array
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tita.bench.choice_answers import LETTERS
from tita.bench.judge import Judgements
from tita.bench.outcomes import Outcome, describe, error_kind, outcome_of, shown_message
from tita.bench.questions import BenchmarkItem
from tita.bench.reasoning import Thinking, separate
from tita.bench.results_file import checked_record
from tita.bench.scoring import (
    JUDGED,
    METRICS,
    hides_options,
    normalise_references,
    score_answer,
)
from tita.terminal import counted, say

Array = np.ndarray[Any, Any]

NAN = float("nan")
_PROGRESS_BYTES = 1 << 22
_PARSED = {"yes": 1, "no": 2} | {letter: 3 + index for index, letter in enumerate(LETTERS)}
YES, NO = _PARSED["yes"], _PARSED["no"]
"""Codes of parsed answers; 0 is unparsed."""

_TIME_FIELDS = {
    "response_time": "response_time",
    "first_token": "time_to_first_token",
    "first_answer": "time_to_first_answer_token",
    "longest_gap": "longest_gap",
    "per_token": "time_per_output_token",
}
"""Columns of times, and their fields in results files."""
_COLUMNS = {
    "offset": "q",  # of the line in the file
    "response_time": "d",
    "first_token": "d",
    "first_answer": "d",  # token of the answer, after reasoning
    "longest_gap": "d",
    "per_token": "d",
    "input_tokens": "d",
    "output_tokens": "d",
    "cost": "d",
    "score": "d",
    "reference_score": "d",  # by the judge, of the reference answer
    "parsed": "b",
    "label": "b",
    "metric": "i",  # code of a name, as in the columns below
    "category": "i",
    "group": "i",
    "group_size": "i",  # number of questions of a complete group
    "error": "i",
    "outcome": "i",
    "has_image": "b",  # 1, 0, or -1 if the line does not say
    "hides_options": "b",  # 1 if the prompt does not have the options
    "sent_at": "d",  # seconds since the epoch
    "session": "i",
}


def _name_codes() -> defaultdict[str, int]:
    """Integer codes of names, in the order of first use."""
    return defaultdict(itertools.count().__next__)


PROTOCOL = (
    "model_name", "weight", "weights", "suite", "questions_sha256", "max_new_tokens", "temperature",
    "request",
)  # fmt: skip
"""Fields that define a run: lines that differ in one of them belong to different runs. Objects
among them are JSON texts."""
LINKS = ("model_id", "model_digest", "base", "base_sha256", "reward", "reward_sha256", "run")
"""Fields that identify the models by name and digest, and the training run."""


@dataclass(slots=True)
class BenchmarkRun:
    """The lines of one results file that share one protocol."""

    path: Path
    protocol: Mapping[str, Any]
    links: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    """Row by question id; of several lines of a question the last successful one counts."""
    columns: dict[str, Any] = field(
        default_factory=lambda: {name: array(kind) for name, kind in _COLUMNS.items()}
    )
    metrics: dict[str, int] = field(default_factory=_name_codes)
    categories: dict[str, int] = field(default_factory=_name_codes)
    groups: dict[str, int] = field(default_factory=_name_codes)
    errors: dict[str, int] = field(default_factory=_name_codes)
    error_messages: dict[str, str] = field(default_factory=dict)
    """The first message of each kind of error."""
    outcomes: dict[str, int] = field(default_factory=_name_codes)
    sessions: dict[str, int] = field(default_factory=_name_codes)
    conditions: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """Conditions (`tita.bench.conditions`) by session; older files have none."""
    num_questions: int = 0
    """Number of questions of the suite that the run was to ask; more than its rows if it was
    interrupted."""
    currency: str | None = None
    prompt_endings: dict[str, str | None] = field(default_factory=dict)
    """Last line of the prompts by metric; None if they differ."""
    num_tokens_changed: int | None = None
    judge: Mapping[str, str] | None = None
    """Model and prompt of the judge, if one scored this run."""

    detail: str = ""
    """What tells this run apart from others of the same model and weight in a report."""

    @property
    def title(self) -> str:
        """Name of the run in tables and legends."""
        return f"{self.name} ({self.detail})" if self.detail else self.name

    @property
    def name(self) -> str:
        """Model and weight, or the weights of several reward models."""
        weight, weights = self.protocol["weight"], self.protocol["weights"]
        name = str(self.protocol["model_name"])
        if weights:
            each = json.loads(weights).items()
            return f"{name} {'+'.join(f'{reward}={value:g}' for reward, value in each)}"
        return name if weight is None else f"{name} w={weight:g}"

    @property
    def total_weight(self) -> float | None:
        """The guidance weight, of several reward models together; None if none was sent."""
        if weights := self.protocol["weights"]:
            return float(sum(json.loads(weights).values()))
        weight = self.protocol["weight"]
        return None if weight is None else float(weight)

    def column(self, name: str) -> Array:
        """The values of one column, one per question."""
        values = np.frombuffer(self.columns[name], dtype=np.dtype(_COLUMNS[name]))
        if len(values) == len(self.rows):
            return values
        return values[np.fromiter(self.rows.values(), dtype=np.int64, count=len(self.rows))]

    def read(self, identities: Sequence[str]) -> list[dict[str, Any]]:
        """The records of some questions, read again from the file."""
        records = []
        with self.path.open("rb") as file:
            for identity in identities:
                file.seek(self.columns["offset"][self.rows[identity]])
                records.append(json.loads(file.readline()))
        return records


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceQuestions:
    """Questions in the folder of older results files, which contain no references."""

    items: Mapping[str, BenchmarkItem]
    sha256: str


def read_columns(
    path: Path,
    *,
    references: ReferenceQuestions | None = None,
    judgements: Judgements | None = None,
    prices: Mapping[str, Mapping[str, Any]] | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[BenchmarkRun]:
    """The runs of one results file, in the order of their first lines.

    Args:
        references: questions that lines without references are joined to by id and prompt.
        judgements: scores of the questions with a judged metric.
        prices: token price by model name, for lines without a price.
        advance: called with the number of bytes read since its last call.
    """
    runs: dict[tuple[Any, ...], BenchmarkRun] = {}
    offset = reported = num_skipped = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            record = checked_record(line, path=path, number=number)
            # The last line may be incomplete, because the run is not over or was killed.
            num_skipped += record is None and bool(line.strip()) and line.endswith(b"\n")
            if record is not None:
                if references is not None and "references" not in record:
                    record = _join(record, references)
                key = tuple(_hashable(record.get(name)) for name in PROTOCOL)
                run = runs.get(key)
                if run is None:
                    run = runs[key] = BenchmarkRun(path, dict(zip(PROTOCOL, key, strict=True)))
                    run.links = {name: record[name] for name in LINKS if record.get(name)}
                    run.judge = judgements.judge if judgements else None
                if record.get("conditions"):
                    run.conditions[str(record.get("session"))] = record["conditions"]
                where = f"{path}:{number}"
                _append(
                    run, record, offset=offset, where=where, prices=prices or {},
                    judgements=judgements,
                )  # fmt: skip
            offset += len(line)
            if advance is not None and offset - reported >= _PROGRESS_BYTES:
                advance(offset - reported)
                reported = offset
    if advance is not None:
        advance(offset - reported)
    if num_skipped:
        say(f"{path}: left out {counted(num_skipped, 'line')}, damaged or with no result")
    return list(runs.values())


def _hashable(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else value


def _join(record: dict[str, Any], references: ReferenceQuestions) -> dict[str, Any]:
    """The record with the fields of its question, if id and prompt agree."""
    item = references.items.get(str(record["question_id"]))
    if item is None or item.text.strip() != str(record.get("prompt", "")).strip():
        return record
    question = {key: value for key, value in item.record().items() if key != "text"}
    return question | {"questions_sha256": references.sha256} | record


def _append(
    run: BenchmarkRun,
    record: Mapping[str, Any],
    *,
    offset: int,
    where: str,
    prices: Mapping[str, Mapping[str, Any]],
    judgements: Judgements | None,
) -> None:
    identity = str(record["question_id"])
    answer = answer_of(record)
    outcome = _outcome(record, answer)
    success = outcome.is_answer
    error = record.get("error_message") or describe(outcome)
    earlier = run.rows.get(identity)
    if earlier is not None and not success:
        return
    if not success:
        run.error_messages.setdefault(error_kind(error), shown_message(error))
    columns = run.columns
    row = {
        "offset": offset,
        **_times(record, outcome=outcome),
        "input_tokens": _number(record.get("input_tokens")),
        "output_tokens": _number(record.get("output_tokens")),
        "cost": _cost(run, record, prices=prices),
        "category": run.categories[str(record.get("category", ""))],
        "group": run.groups[str(record.get("group", ""))],
        "error": -1 if success else run.errors[error_kind(error)],
        "outcome": run.outcomes[str(outcome)],
        "has_image": _has_image(record),
        "hides_options": hides_options(
            str(record.get("metric", "")), str(record.get("prompt")), record.get("choices") or ()
        ),
        "sent_at": _number(record.get("sent_at")),
        "session": run.sessions[str(record.get("session", ""))],
        **_scores(
            run, record, answer=answer if success else None, where=where, judgements=judgements
        ),
    }
    for name, value in row.items():
        columns[name].append(value)
    run.rows[identity] = len(columns["offset"]) - 1
    run.num_questions = max(len(run.rows), _count(record.get("num_questions")))
    metric = str(record.get("metric", ""))
    ending = str(record.get("prompt", "")).rstrip().rpartition("\n")[2]
    if run.prompt_endings.setdefault(metric, ending) != ending:
        run.prompt_endings[metric] = None
    changed = (record.get("usage") or {}).get("changed_tokens")
    if isinstance(changed, int):
        run.num_tokens_changed = (run.num_tokens_changed or 0) + changed


def _outcome(record: Mapping[str, Any], answer: str) -> Outcome:
    """The outcome of a line; that of an older line follows from its answer."""
    with contextlib.suppress(ValueError):
        return Outcome(str(record.get("outcome")))
    if not record["success"]:
        return Outcome.ERROR
    return outcome_of(answer, finish_reason=record.get("finish_reason"))


def _has_image(record: Mapping[str, Any]) -> int:
    """1 if the question was sent with an image, 0 if not; -1 for a line without its question.

    Lines of older tools do not have the fields of their questions.
    """
    if record.get("image") or record.get("images"):
        return 1
    return 0 if "questions_sha256" in record else -1


def answer_of(record: Mapping[str, Any]) -> str:
    """The answer of a line; that of an older line may begin with `<think>...</think>`."""
    thinking = Thinking(record.get("thinking", Thinking.AUTO))
    response = record["response"]
    return separate("" if response is None else str(response), thinking).answer


def _times(record: Mapping[str, Any], *, outcome: Outcome) -> dict[str, float]:
    """Times in seconds of a response that was generated to its end; nan otherwise."""
    return {
        column: _number(record.get(name)) if outcome.is_timed else NAN
        for column, name in _TIME_FIELDS.items()
    }


def _scores(
    run: BenchmarkRun,
    record: Mapping[str, Any],
    *,
    answer: str | None,
    where: str,
    judgements: Judgements | None,
) -> dict[str, Any]:
    """Score the answer again, so that a corrected metric also applies to older results."""
    metric = str(record.get("metric", ""))
    choices: Sequence[str] = record.get("choices") or ()
    references = normalise_references(
        metric, record.get("references") or (), choices=choices, where=where
    )
    empty = {
        "score": NAN, "reference_score": NAN, "parsed": 0, "label": 0,
        "metric": run.metrics[metric],
        "group_size": METRICS[metric].group_size(choices) if metric in METRICS else 1,
    }  # fmt: skip
    if answer is None:
        return empty
    if metric in JUDGED:
        given = judgements.scores.get(str(record["question_id"])) if judgements else None
        return empty if given is None else empty | {"score": given[0], "reference_score": given[1]}
    scored = score_answer(metric, answer, references=references, choices=choices)
    if scored is None:
        return empty
    return empty | {
        "score": scored.score,
        "parsed": _PARSED.get(scored.parsed or "", 0),
        "label": _PARSED.get(references[0], 0),
    }


def _cost(
    run: BenchmarkRun, record: Mapping[str, Any], *, prices: Mapping[str, Mapping[str, Any]]
) -> float:
    price = record.get("price") or prices.get(str(record["model_name"]))
    if price is None or run.currency not in (None, price["currency"]):
        return NAN
    run.currency = price["currency"]
    num_input, num_output = (_number(record.get(f"{side}_tokens")) for side in ("input", "output"))
    return float((price["input"] * num_input + price["output"] * num_output) / 1e6)


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) else NAN
    except OverflowError:
        return NAN


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0
