"""The results file: JSONL, one line per question, written as soon as the answer is there.

The first ten fields are those that older tools write; the others are tita's.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tita.bench.chat_response import Reply
from tita.bench.outcomes import Outcome, describe, outcome_of
from tita.bench.questions import BenchmarkItem
from tita.bench.reasoning import Thinking, separate
from tita.bench.scoring import score_answer
from tita.data.append_log import AppendLog, json_object
from tita.errors import TitaError
from tita.json_text import clean_text, dump_json

_IDENTITY = ("model_name", "weight", "questions_sha256", "max_new_tokens", "temperature")
"""Fields that all lines of a file share: a file never mixes models or protocols."""
_OPTIONAL = ("request", "thinking", "weights", "ignore_columns", "judges")
"""The same, for fields that are only written if an option is set."""
_MARKERS = ("question_id", "model_name", "response", "success")
_TYPES: Mapping[str, tuple[str, tuple[type, ...]]] = {
    "success": ("true or false", (bool, int)),
    "response": ("a text", (str, int, float)),
    "finish_reason": ("a text", (str,)),
    "thinking": ("a text", (str,)),
    "references": ("a list", (list,)),
    "choices": ("a list", (list,)),
    "weight": ("a number", (int, float)),
    "weights": ("an object", (dict,)),
    "usage": ("an object", (dict,)),
    "price": ("an object", (dict,)),
    "conditions": ("an object", (dict,)),
}
"""Types of the fields that reports read; null is as if the field were absent."""


def answer_record(
    item: BenchmarkItem,
    reply: Reply | None,
    *,
    error: str = "",
    attempts: int,
    run: Mapping[str, Any],
    num_questions: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """One line of a results file.

    Args:
        reply: the answer; None if the question failed with `error`.
        run: the fields that all lines share: `model_name`, `weight` and the rest of the protocol.
        num_questions: of `count_by_suite`.
    """
    shared = dict(run)
    answer = reply or Reply()
    separated = separate(answer.text, Thinking(run.get("thinking", Thinking.AUTO)))
    outcome = Outcome.ERROR
    if reply is not None:
        outcome = outcome_of(
            separated.answer, finish_reason=answer.finish_reason, refusal=answer.refusal
        )
        error = describe(outcome, refusal=answer.refusal)
    record: dict[str, Any] = {
        "question_id": item.id,
        "model_name": shared.pop("model_name"),
        "prompt": item.text,
        "response": separated.answer,
        "input_tokens": answer.input_tokens,
        "output_tokens": answer.output_tokens,
        "total_tokens": answer.total_tokens,
        "response_time": round(answer.response_time_s, 6) if reply else None,
        "success": outcome.is_answer,
        "error_message": error or None,
        "outcome": str(outcome),
        "time_to_first_token": _rounded(answer.first_token_s),
        "time_to_first_answer_token": _rounded(answer.arrival_s(separated.answer_start)),
        "time_to_last_token": _rounded(answer.last_token_s),
        "time_per_output_token": _rounded(answer.per_token_s),
        "longest_gap": _rounded(answer.longest_gap_s),
        "finish_reason": answer.finish_reason,
        "attempts": attempts,
    }
    if answer.model_digest:
        record["model_digest"] = answer.model_digest
    if answer.sent_at is not None:
        record["sent_at"] = round(answer.sent_at, 6)
    if reasoning := "\n".join(part for part in (answer.reasoning, separated.reasoning) if part):
        record["reasoning"] = reasoning
    if answer.changed and separated.answer == answer.text:
        record["changed"] = [list(span) for span in answer.changed]
    asked = item.record()
    record |= {key: asked[key] for key in asked if key not in ("question_id", "text", "messages")}
    if outcome.is_answer:
        scored = score_answer(
            item.metric, separated.answer, references=item.references, choices=item.choices
        )
        record["scores"] = None if scored is None else {item.metric: round(scored.score, 6)}
        if scored is not None and scored.parsed is not None:
            record["parsed"] = scored.parsed
    if answer.usage:
        record["usage"] = answer.usage
    if num_questions is not None:
        record["num_questions"] = num_questions[item.suite]
    return record | shared


def count_by_suite(items: Iterable[BenchmarkItem]) -> Mapping[str, int]:
    """Number of questions of each suite: reports make a run of each."""
    return Counter(item.suite for item in items)


class ResultsFile(AppendLog):
    """A results file opened for one writer; a context manager.

    Opening the file removes a truncated last line and failed questions, so that they are asked
    again; with `prompts` (by question id) also the answers to prompts that have changed, and with
    `images` those to images that have changed. Every line names the session that wrote it, whose
    `conditions` (`tita.bench.conditions`) are on its first lines.

    Raises:
        TitaError: another process has the file open, its answers belong to another model or
            protocol, or it is not a results file.
    """

    KIND = "results file"

    def __init__(
        self,
        path: Path,
        *,
        run: Mapping[str, Any],
        prompts: Mapping[str, str] | None = None,
        images: Mapping[str, Sequence[Path]] | None = None,
        conditions: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(path, images=images)
        self._run = run
        self._prompts = prompts
        self._conditions = conditions
        self._conditions_written = False
        self.sessions: dict[str, Mapping[str, Any]] = {}
        """Conditions of earlier runs of the file by session; empty where they are not recorded."""

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line; the conditions are on the lines up to the first success.

        A failed line is removed when the file is opened again, so one on the first line only could
        be lost.
        """
        if self._conditions is not None:
            record = {**record, "session": self._conditions["session"]}
            if not self._conditions_written:
                record["conditions"] = self._conditions
                self._conditions_written = bool(record["success"])
        super().append(record)

    def _parse(self, line: bytes) -> dict[str, Any] | None:
        return parse_line(line)

    def _identity(self, record: Mapping[str, Any]) -> str | None:
        identity = str(record["question_id"])
        if not record["success"]:
            return None
        if self._prompts is not None and self._prompts.get(identity) != record.get("prompt"):
            return None
        if self.has_other_images(record):
            return None
        return identity

    def _check(self, record: Mapping[str, Any], *, where: str) -> None:
        session = str(record.get("session", ""))
        self.sessions[session] = record.get("conditions") or self.sessions.get(session, {})
        for key in _OPTIONAL:
            has_options = "session" in record and record["success"]
            if has_options and record.get(key) != self._run.get(key):
                raise TitaError(
                    f"the file has answers with other options ({key})",
                    where=where,
                    remedy="choose another --out",
                )
        # A model with other weights is another model, if the endpoint reports digests or its path.
        digests = [key for key in self._run if key.endswith(("_sha256", "_digest", "_root"))]
        known = [key for key in digests if self._run[key] and key not in _IDENTITY]
        for key in (*_IDENTITY, *known):
            value = self._run.get(key)
            # Older files have the model id as the model name.
            fit = (value, self._run.get("model_id")) if key == "model_name" else (value,)
            if key in record and record[key] not in fit:
                raise TitaError(
                    f"the file has answers with {key} {record[key]!r}, not {value!r}",
                    where=where,
                    remedy="choose another --out",
                )


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The record of one line; None if the line is truncated or not a result."""
    record = json_object(line)
    return record if record is not None and all(key in record for key in _MARKERS) else None


def read_results(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a results file; truncated lines are skipped.

    Raises:
        TitaError: a field has a value of another type.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            record = checked_record(line, path=path, number=number)
            if record is not None:
                yield record


def checked_record(line: bytes, *, path: Path, number: int) -> dict[str, Any] | None:
    """As `parse_line`, of a file that another tool may have written.

    Raises:
        TitaError: a field has a value of another type.
    """
    record = parse_line(line)
    if record is None:
        return None
    for name, (what, types) in _TYPES.items():
        value = record.get(name)
        if value is not None and not isinstance(value, types):
            raise _bad_field(f"{name!r} is not {what}", path=path, number=number)
    if record.get("thinking") not in (None, *Thinking):
        raise _bad_field(f"unknown 'thinking' {record['thinking']!r}", path=path, number=number)
    for name in ("references", "choices"):
        if not all(isinstance(value, str) for value in record.get(name) or ()):
            raise _bad_field(f"{name!r} has a value that is not a text", path=path, number=number)
    if (price := record.get("price")) and not (
        all(isinstance(price.get(side), int | float) for side in ("input", "output"))
        and isinstance(price.get("currency"), str)
    ):
        raise _bad_field("'price' has no input, output or currency", path=path, number=number)
    if b"\\u" in line and (text := dump_json(record, ensure_ascii=False)) != clean_text(text):
        raise _bad_field("half a character (a lone surrogate)", path=path, number=number)
    return record


def _bad_field(what: str, *, path: Path, number: int) -> TitaError:
    return TitaError(what, where=f"{path}:{number}", remedy="fix or remove the line")


def find_results_files(folder: Path) -> list[Path]:
    """The results files of a folder: JSONL files whose first record is a result.

    Raises:
        TitaError: the folder does not exist.
    """
    if not folder.is_dir():
        raise TitaError("no such folder", where=str(folder), remedy="check the path")
    paths = sorted(path for path in folder.glob("*.jsonl") if not path.name.startswith("."))
    return [path for path in paths if next(read_results(path), None) is not None]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
