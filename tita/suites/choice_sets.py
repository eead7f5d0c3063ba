"""Sets of multiple-choice and short questions: MMStar, RealWorldQA, MMMU.

MMStar: arXiv 2403.20330. RealWorldQA: xAI, April 2024. MMMU: arXiv 2311.16502.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tita.bench.choice_answers import LETTERS
from tita.bench.llava_prompts import LETTER_PROMPT, SHORT_PROMPT, with_options
from tita.bench.published_files import find_file
from tita.bench.questions import BenchmarkItem
from tita.data.cells import parse_python
from tita.data.dataset import write_image
from tita.data.embedded_images import decode_base64, embedded_content
from tita.data.rows import read_rows
from tita.errors import TitaError
from tita.suites.scorers import (
    LENGTH,
    Figure,
    ScoredQuestion,
    Scorer,
    metric_counts,
    ratio,
)

_OPTION = re.compile(r"(?:^|[\n,;:]\s*)\(?([A-J])[.:)]\s+", re.M)


def read_mmstar(source: Path, *, out: Path) -> Iterator[BenchmarkItem]:
    """MMStar: `mmstar.parquet`, or a table `MMStar*.tsv` with images in base64.

    The questions of the Parquet file have their options in them; the table has a column of each.

    Raises:
        TitaError: the file is missing, or a question has no options.
    """
    path = _find(source, "mmstar*.parquet", "MMStar*.parquet", "MMStar*.tsv", "*.parquet")
    for row in read_rows(path):
        entry = row.parse()
        columns = tuple(str(entry[letter]) for letter in LETTERS if _has(entry, letter))
        question = str(entry["question"])
        choices = columns or options_in(question)
        if len(choices) < 2:
            raise TitaError("the question has no options", where=row.where)
        text = with_options(question, choices) if columns else f"{question}\n{LETTER_PROMPT}"
        yield BenchmarkItem(
            id=str(entry["index"]),
            text=text,
            images=(_image(entry["image"], into=out, where=row.where),),
            references=(str(entry["answer"]).strip(),),
            choices=choices,
            metric="choice",
            suite="mmstar",
            category=str(entry["category"]),
        )


def read_real_world_qa(source: Path, *, out: Path) -> Iterator[BenchmarkItem]:
    """RealWorldQA: Parquet files with `image`, `question`, `answer`, or xAI's `annotations.jsonl`.

    A question with options (`A. ...`) has its letter as the answer, others a word or a number.

    Raises:
        TitaError: there is no such file.
    """
    paths = sorted(source.glob("**/*.parquet")) or [find_file(source, "annotations.jsonl")]
    number = 0
    for path in paths:
        for row in read_rows(path):
            entry = row.parse()
            question, answer = str(entry["question"]).strip(), str(entry["answer"]).strip()
            choices = options_in(question)
            is_choice = len(answer) == 1 and answer in LETTERS[: len(choices)]
            yield BenchmarkItem(
                id=str(number),
                text=question,
                images=(_image(entry["image"], into=out, where=row.where),),
                references=(answer,),
                choices=choices if is_choice else (),
                metric="choice" if is_choice else "real-world-qa",
                suite="realworldqa",
                category="choice" if is_choice else "open",
            )
            number += 1


def read_mmmu(source: Path, *, out: Path) -> Iterator[BenchmarkItem]:
    """MMMU's validation split: `<Subject>/validation-*.parquet`, or one table of all subjects.

    Images are in the columns `image_1` to `image_7`; `<image 1>` in question or options marks them.
    The prompts are those of lmms-eval and LLaVA.

    Raises:
        TitaError: there is no such file, or an answer fits no option.
    """
    paths = sorted(source.glob("**/validation-*.parquet"))
    for path in paths or [_find(source, "*validation*.parquet", "MMMU*.parquet", "*.parquet")]:
        for row in read_rows(path):
            entry = row.parse()
            choices = tuple(map(str, _list(entry["options"], where=row.where)))
            is_choice = str(entry["question_type"]) == "multiple-choice"
            question = str(entry["question"])
            answer = _list(entry["answer"], where=row.where)
            images = [entry[f"image_{n}"] for n in range(1, 8) if _has(entry, f"image_{n}")]
            yield BenchmarkItem(
                id=str(entry["id"]),
                text=with_options(question, choices)
                if is_choice
                else f"{question}\n{SHORT_PROMPT}",
                images=tuple(_image(image, into=out, where=row.where) for image in images),
                references=tuple(map(str, answer)),
                choices=choices if is_choice else (),
                metric="choice" if is_choice else "mmmu-open",
                suite="mmmu",
                category=_subject(str(entry["id"])),
            )


def _subject(identity: str) -> str:
    """Accounting, of validation_Accounting_1."""
    return identity.removeprefix("validation_").rpartition("_")[0]


def _list(value: Any, *, where: str) -> list[Any]:
    """The list in a cell, which may stand in it as a text; a plain text is a list of one."""
    if isinstance(value, list):
        return value
    text = str(value).strip()
    if not (text.startswith("[") and text.endswith("]")):
        return [text]
    parsed = parse_python(text)
    if not isinstance(parsed, list):
        raise TitaError(f"{text[:40]!r} is not a list", where=where)
    return parsed


def options_in(question: str) -> tuple[str, ...]:
    """The options that stand in a question as `A: ...` or `A. ...`, from A on without a gap."""
    found = list(_OPTION.finditer(question))
    texts: list[str] = []
    for number, match in enumerate(found):
        if match[1] != LETTERS[len(texts)]:
            continue
        following = [m for m in found[number + 1 :] if m[1] == LETTERS[len(texts) + 1]]
        end = following[0].start() if following else len(question)
        texts.append(question[match.end() : end].split("\n")[0].strip().rstrip(",;"))
    return tuple(texts) if len(texts) > 1 else ()


def _has(entry: Mapping[str, Any], column: str) -> bool:
    value = entry.get(column)
    return value is not None and str(value).strip().lower() not in ("", "nan")


def _image(value: Any, *, into: Path, where: str) -> str:
    """The name of an image: that of a file, or of the file that an embedded one is written to."""
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if isinstance(content, str):
        encoded = embedded_content(content)
        if encoded is None:
            return content
        content = decode_base64(encoded)
    if not isinstance(content, bytes):
        raise TitaError("the row has no image", where=where, remedy="give the published file")
    return write_image(content, into=into)


def _find(source: Path, *patterns: str) -> Path:
    nested = [pattern for one in patterns for pattern in (one, f"data/{one}")]
    return find_file(source, *nested)


_DISCIPLINES = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy", "Public_Health",
    ),
    "Humanities": ("History", "Literature", "Psychology", "Sociology"),
    "Technology": (
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics",
        "Energy_and_Power", "Materials", "Mechanical_Engineering",
    ),
}  # fmt: skip
_DISCIPLINE_OF = {subject: name for name, own in _DISCIPLINES.items() for subject in own}
_MMSTAR_CATEGORIES = (
    "coarse perception", "fine-grained perception", "instance reasoning", "logical reasoning",
    "math", "science & technology",
)  # fmt: skip


def _category_figures(names: Sequence[str]) -> dict[str, Figure]:
    return {name: Figure(value=ratio(f"{name}: score", f"{name}: questions")) for name in names}


def _by_category(counts: Mapping[str, float] | None, name: str) -> dict[str, float] | None:
    if counts is None or not name:
        return None if counts is None else dict(counts)
    return {**counts, f"{name}: score": counts["score"], f"{name}: questions": 1.0}


def _scorer(names: Sequence[str], category: Mapping[str, str] | None = None) -> Scorer:
    """Accuracy, and that of each category by its name or the name that `category` gives."""

    def count(question: ScoredQuestion) -> dict[str, float] | None:
        name = question.category if category is None else category.get(question.category, "")
        return _by_category(metric_counts(question), name)

    return Scorer(
        load=lambda _: count,
        figures={
            "accuracy": Figure(value=ratio("score", "questions")),
            **_category_figures(names),
            "length in words": LENGTH,
        },
    )


MMSTAR_SCORER = _scorer(_MMSTAR_CATEGORIES)
REAL_WORLD_QA_SCORER = _scorer(("choice", "open"))
MMMU_SCORER = _scorer(tuple(_DISCIPLINES), _DISCIPLINE_OF)
