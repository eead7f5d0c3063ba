"""Multiple choice: ScienceQA, MMBench, SEED-Bench."""

import base64
import binascii
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from tita.bench.items import Item
from tita.bench.suites.source import find, load, with_options
from tita.errors import TitaError


def read_science_qa(source: Path, *, split: str = "test") -> Iterator[Item]:
    """ScienceQA (arXiv 2209.09513): `problems.json` and `pid_splits.json`, images in `<id>/`.

    The category tells questions with an image from those without: LLaVA reports both.
    """
    problems = load(find(source, "problems.json"))
    splits = load(find(source, "pid_splits.json"))
    if split not in splits:
        raise TitaError(f"no split {split!r}", where=str(source), remedy=f"one of {list(splits)}")
    for identity in splits[split]:
        entry = problems[identity]
        choices = tuple(entry["choices"])
        context = f"Context: {entry['hint']}\n" if entry.get("hint") else ""
        image = entry.get("image")
        yield Item(
            id=str(identity),
            text=with_options(f"{context}{entry['question']}", choices),
            images=(f"{identity}/{image}",) if image else (),
            references=("ABCDEFGHIJ"[entry["answer"]],),
            choices=choices,
            metric="science-qa",
            suite="scienceqa",
            category="image" if image else "text",
        )


def read_mmbench(source: Path, *, images: Path) -> Iterator[Item]:
    """MMBench (arXiv 2307.06281): a table such as `mmbench_dev_20230712.tsv`, images in base64.

    Every question is asked once for each of its options, which go round by one each time
    (CircularEval). Images are written to `images`. The test splits have no answers.
    """
    path = find(source, "mmbench_dev_*.tsv", "*mmbench*.tsv", "*MMBench*.tsv", "*.tsv")
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8", newline="") as table:
        for row in csv.DictReader(table, delimiter="\t"):
            # From 20231003 on the tables hold the rotations too, under index + 1,000,000.
            if int(row["index"]) < 1_000_000:
                yield from _rotations(row, path=path, images=images)


def _rotations(row: dict[str, str], *, path: Path, images: Path) -> Iterator[Item]:
    index = row["index"]
    name = f"mmbench_{index}.jpg"
    try:
        (images / name).write_bytes(base64.b64decode(row["image"], validate=True))
    except binascii.Error:
        raise TitaError(f"no image in base64 at index {index}", where=str(path)) from None
    letters = [letter for letter in "ABCD" if not _is_none(row.get(letter))]
    options = [row[letter] for letter in letters]
    hint = "" if _is_none(row.get("hint")) else f"{row['hint']}\n"
    right = row.get("answer", "")
    for turn in range(len(options)):
        choices = tuple(options[turn:] + options[:turn])
        answer = () if _is_none(right) else (letters[(letters.index(right) - turn) % len(letters)],)
        yield Item(
            id=f"{index}-{turn}",
            text=with_options(f"{hint}{row['question']}", choices),
            images=(name,),
            references=answer,
            choices=choices,
            metric="circular",
            suite="mmbench",
            category=row.get("category", ""),
            group=index,
        )


def _is_none(value: str | None) -> bool:
    return value is None or value.strip().lower() in ("", "nan", "none")


def read_seed_bench(source: Path) -> Iterator[Item]:
    """SEED-Bench (arXiv 2307.16125): `SEED-Bench.json`, images in `SEED-Bench-image/`.

    A video stands for its middle frame, as in LLaVA-1.5, looked for as
    `SEED-Bench-video-image/<question id>.png`. The published code ranks options by likelihood; an
    endpoint can only be asked for the letter, as LLaVA does.
    """
    data = load(find(source, "SEED-Bench.json", "SEED-Bench*.json"))
    kinds = {number: name for name, number in data.get("question_type", {}).items()}
    for entry in data["questions"]:
        choices = tuple(entry[f"choice_{letter}"] for letter in "abcd")
        video = entry["data_type"] == "video"
        image = (
            f"SEED-Bench-video-image/{entry['question_id']}.png"
            if video
            else f"SEED-Bench-image/{entry['data_id']}"
        )
        yield Item(
            id=str(entry["question_id"]),
            text=with_options(entry["question"], choices),
            images=(image,),
            references=(entry["answer"],),
            choices=choices,
            metric="choice",
            suite="seed-bench",
            # `image+...` and `video+...`: scores are given by medium and by type.
            category=f"{'video' if video else 'image'}+"
            + kinds.get(entry["question_type_id"], str(entry["question_type_id"])),
        )
