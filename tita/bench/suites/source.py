"""Reading published files, with errors that name the file and the line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tita.bench.metrics.choice import LETTERS
from tita.bench.question_files import read_records
from tita.errors import TitaError

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
"""LLaVA-1.5's two prompts (`docs/Evaluation.md` of github.com/haotian-liu/LLaVA)."""


def find(source: Path, *patterns: str) -> Path:
    """The one file in `source` that matches a pattern; the first pattern that matches any decides.

    Raises:
        TitaError: none or several match.
    """
    for pattern in patterns:
        found = sorted(source.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise TitaError(
                f"several files match {pattern} ({names})",
                where=str(source),
                remedy="leave the one that is meant",
            )
        if found:
            return found[0]
    raise TitaError(
        f"no {' or '.join(patterns)} in it",
        where=str(source),
        remedy="give the folder that the published files were unpacked into",
    )


def load(path: Path) -> Any:
    """A JSON file.

    Raises:
        TitaError: it is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TitaError(f"not JSON ({error})", where=str(path)) from None


def load_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file.

    Raises:
        TitaError: a line is no JSON object.
    """
    return (record for _, record in read_records(path))


def with_options(question: str, choices: tuple[str, ...]) -> str:
    """LLaVA-1.5's option-only prompt."""
    listed = "".join(
        f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)
    )
    return f"{question}{listed}\n{LETTER}"
