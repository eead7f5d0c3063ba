"""The answers file: JSONL in the spelling of LLaVA's, one line as soon as it is answered.

LLaVA's evaluation scripts read `question_id`, `prompt`, `text`, `answer_id`, `model_id` and
`metadata` (`llava/eval/model_vqa_loader.py`); the rest is ours.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tita.align import Answer
from tita.data.append_log import AppendLog, json_object
from tita.errors import TitaError
from tita.infer.questions import Asked

_MARKERS = ("question_id", "prompt", "text", "model_id", "metadata")


def answer_line(
    asked: Asked, answer: Answer | TitaError, *, model_id: str, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """One line; a question without an answer has an empty text and says why in `error`."""
    line = {
        "question_id": asked.id,
        "prompt": asked.text,
        "text": "" if isinstance(answer, TitaError) else answer.text,
        "answer_id": _digest(asked.id, asked.text, model_id, metadata),
        "model_id": model_id,
        "metadata": dict(metadata),
    }
    if asked.image is not None:
        line["image"] = asked.image.name
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

    Opening it mends a torn last line, and drops failed answers and those to a question that has
    changed since, so that they are asked again.

    Raises:
        TitaError: another writer has it, its answers are of other models or another way of asking,
            or it is something else than an answers file.
    """

    KIND = "answers file"

    def __init__(
        self, path: Path, *, model_id: str, metadata: Mapping[str, Any], prompts: Mapping[str, str]
    ) -> None:
        """Args:
        path: the file; it need not be there.
        model_id: what the answers call the model.
        metadata: what all lines have in common.
        prompts: the questions, by the text of their ids.
        """
        super().__init__(path)
        # As it comes back from the file.
        self._shared = json.loads(json.dumps({"model_id": model_id, **metadata}))
        self._prompts = prompts

    def _parse(self, line: bytes) -> dict[str, Any] | None:
        record = json_object(line)
        return record if record is not None and all(key in record for key in _MARKERS) else None

    def _identity(self, record: Mapping[str, Any]) -> str | None:
        identity = str(record["question_id"])
        if record.get("error") or self._prompts.get(identity) != record["prompt"]:
            return None
        return identity

    def _check(self, record: Mapping[str, Any], *, where: str) -> None:
        theirs = {"model_id": record["model_id"], **record["metadata"]}
        for key, value in self._shared.items():
            if theirs.get(key) != value:
                raise TitaError(
                    f"holds answers with {key} {theirs.get(key)!r}, not {value!r}",
                    where=where,
                    remedy="choose another --out",
                )


def _digest(*parts: Any) -> str:
    """The same question asked the same way has the same `answer_id`."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:22]
