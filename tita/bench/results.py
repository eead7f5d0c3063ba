"""The results file: JSONL, one line a question, written as soon as it is answered.

The first ten fields are the ones that older tools write; ours stand beside them. A file has one
writer at a time, holds every question once, and is never without its earlier answers: mending
writes a new file and renames it.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tita.bench.endpoint import Reply
from tita.bench.items import Item
from tita.bench.scoring import score_answer
from tita.errors import TitaError

FIRST_FIELDS = (
    "question_id", "model_name", "prompt", "response", "input_tokens", "output_tokens",
    "total_tokens", "response_time", "success", "error_message",
)  # fmt: skip
_IDENTITY = ("model_name", "weight", "questions_sha256", "max_new_tokens", "temperature")
"""What all lines of one file share: a file never mixes models or protocols."""
_IF_KNOWN = ("base_sha256", "reward_sha256")
"""Likewise, where the endpoint says it: a model that was changed meanwhile is another."""
_MARKERS = ("question_id", "model_name", "response", "success")


def answer_record(
    item: Item,
    reply: Reply | None,
    *,
    error: str = "",
    attempts: int,
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """One line of a results file.

    Args:
        reply: the answer; None if the question failed with `error`.
        run: what is the same in every line: `model_name`, `weight` and the rest of the protocol.
    """
    shared = dict(run)
    answer = reply or Reply()
    record: dict[str, Any] = {
        "question_id": item.id,
        "model_name": shared.pop("model_name"),
        "prompt": item.text,
        "response": answer.text,
        "input_tokens": answer.input_tokens,
        "output_tokens": answer.output_tokens,
        "total_tokens": answer.total_tokens,
        "response_time": round(answer.response_time_s, 6) if reply else None,
        "success": reply is not None,
        "error_message": error or None,
        "time_to_first_token": _rounded(answer.first_token_s),
        "time_per_output_token": _rounded(answer.per_token_s),
        "finish_reason": answer.finish_reason,
        "attempts": attempts,
    }
    asked = item.record()
    record |= {key: asked[key] for key in asked if key not in ("question_id", "text")}
    if reply is not None:
        scored = score_answer(
            item.metric, answer.text, references=item.references, choices=item.choices
        )
        record["scores"] = None if scored is None else {item.metric: round(scored.score, 6)}
        if scored is not None and scored.parsed is not None:
            record["parsed"] = scored.parsed
        if answer.usage:
            record["usage"] = answer.usage
    return record | shared


class ResultsFile:
    """A results file open for one writer; use it as a context manager.

    Opening it mends a torn last line and drops failed questions, so that they are asked again; with
    `prompts` (by question id) also answers to a prompt that has changed since.

    Raises:
        TitaError: another writer has it, its answers belong to another model or protocol, or it is
            something else than a results file.
    """

    def __init__(
        self,
        path: Path,
        *,
        run: Mapping[str, Any],
        prompts: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self._run = run
        self._prompts = prompts
        self._file: IO[bytes] | None = None
        self.done: set[str] = set()
        """Ids of the questions that stand answered in the file."""

    def __enter__(self) -> "ResultsFile":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _open_locked(self.path)
        try:
            self._mend()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line; once this returns, killing the process does not lose it."""
        assert self._file is not None, "the file is not open"
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        if record["success"]:
            self.done.add(record["question_id"])

    def _mend(self) -> None:
        assert self._file is not None
        whole, num_results, num_torn = True, 0, 0
        self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            record = parse_line(line)
            if record is None or not self._keeps(record, number=number):
                whole = False
            num_results += record is not None
            num_torn += record is None and bool(line.strip())
            if record is None and _is_json(line):
                raise self._is_something_else()
        if num_torn > 1 and not num_results:
            raise self._is_something_else()
        if whole and not _ends_torn(self._file):
            self._file.seek(0, os.SEEK_END)
            return
        self._rewrite()

    def _is_something_else(self) -> TitaError:
        """Mending drops what is no result; a file named by mistake must not be emptied so."""
        return TitaError("is no results file", where=str(self.path), remedy="choose another --out")

    def _keeps(self, record: Mapping[str, Any], *, number: int) -> bool:
        known = [key for key in _IF_KNOWN if self._run.get(key)]
        for key in (*_IDENTITY, *known):
            value = self._run.get(key)
            # Older files call a model by its id.
            fit = (value, self._run.get("model_id")) if key == "model_name" else (value,)
            if key in record and record[key] not in fit:
                raise TitaError(
                    f"holds answers with {key} {record[key]!r}, not {value!r}",
                    where=f"{self.path}:{number}",
                    remedy="choose another --out",
                )
        identity = str(record["question_id"])
        if not record["success"] or identity in self.done:
            return False
        if self._prompts is not None and self._prompts.get(identity) != record.get("prompt"):
            return False
        self.done.add(identity)
        return True

    def _rewrite(self) -> None:
        """Write the answered questions to a new, locked file, and put it in the old one's place."""
        assert self._file is not None
        self.done.clear()
        temporary = self.path.with_name(f".{self.path.name}.part")
        new = temporary.open("w+b")
        fcntl.flock(new, fcntl.LOCK_EX)
        self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            record = parse_line(line)
            if record is not None and self._keeps(record, number=number):
                new.write(line.rstrip(b"\n") + b"\n")
        new.flush()
        os.fsync(new.fileno())
        temporary.replace(self.path)
        self._file.close()
        self._file = new


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The record of one line; None if it is torn or no result."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not all(key in record for key in _MARKERS):
        return None
    return record


def read_results(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a results file, line by line; torn lines are left out."""
    with path.open("rb") as lines:
        for line in lines:
            record = parse_line(line)
            if record is not None:
                yield record


def results_files(folder: Path) -> list[Path]:
    """Every results file in a folder, whatever its name: a JSONL file whose first record is one.

    Raises:
        TitaError: there is no such folder.
    """
    if not folder.is_dir():
        raise TitaError("no such folder", where=str(folder), remedy="check the path")
    paths = sorted(path for path in folder.glob("*.jsonl") if not path.name.startswith("."))
    return [path for path in paths if next(read_results(path), None) is not None]


def _open_locked(path: Path) -> IO[bytes]:
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise TitaError(
                "another tita-bench is writing to it",
                where=str(path),
                remedy="wait for it or choose another --out",
            ) from None
        # The holder may have renamed a mended file into place between our open and our lock.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


def _ends_torn(file: IO[bytes]) -> bool:
    size = file.seek(0, os.SEEK_END)
    if not size:
        return False
    file.seek(size - 1)
    return file.read(1) != b"\n"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
