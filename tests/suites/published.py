"""Small copies of published evaluation sets, in their layouts."""

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image

from tita.bench.questions import BenchmarkItem, read_items, write_items
from tita.suites.catalog import SETS
from tita.suites.scorers import ScoredQuestion, values_of


def png(colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(content, "png")
    return content.getvalue()


def write(folder: Path, files: Mapping[str, Any]) -> Path:
    """Write files: bytes, text, rows of a `.jsonl` or `.parquet`, or JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content)
        elif name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
        elif name.endswith(".jsonl") or "pope" in name:
            path.write_text("".join(json.dumps(line) + "\n" for line in content))
        else:
            path.write_text(json.dumps(content))
    return folder


def read(name: str, folder: Path, files: Mapping[str, Any]) -> list[BenchmarkItem]:
    """The questions of a set, written to a question file and read again."""
    source, out = write(folder / "source", files), folder / "out"
    path = out / "questions.jsonl"
    out.mkdir(exist_ok=True)
    num = write_items(path, SETS[name].read(source, out=out))
    items = list(read_items(path))
    assert len(items) == num
    return items


def answered(
    item: BenchmarkItem, answer: str, *, review: tuple[float, float] | None = None
) -> ScoredQuestion:
    return ScoredQuestion(
        id=item.id, answer=answer, metric=item.metric, references=item.references,
        choices=item.choices, category=item.category, group=item.group,
        image=(item.images or ("",))[0], review=review,
    )  # fmt: skip


def figures(name: str, questions: list[ScoredQuestion], folder: Path) -> dict[str, float]:
    scorer = SETS[name].scorer
    scored = scorer.score(questions, folder=folder / "out")
    return values_of(scorer.gather(scored.values()), scorer.figures)


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()
