"""Free answers that a judge scores: LLaVA-Bench (in the wild) and MM-Vet."""

from collections.abc import Iterator
from pathlib import Path

from tita.bench.items import Item
from tita.bench.judge import LLAVA_BENCH, MM_VET
from tita.bench.suites.source import find, load, load_lines


def read_llava_bench(source: Path) -> Iterator[Item]:
    """LLaVA-Bench (arXiv 2304.08485): `questions.jsonl`, `answers_gpt4.jsonl`, `context.jsonl`.

    The references are the text-only GPT-4's answer and the caption that it was shown.
    """
    answers = {
        line["question_id"]: line["text"] for line in load_lines(find(source, "answers_gpt4.jsonl"))
    }
    captions = {
        line["image"]: line["caption"] for line in load_lines(find(source, "context.jsonl"))
    }
    for line in load_lines(find(source, "questions.jsonl")):
        caption = captions[line["image"]]
        context = "\n".join(caption) if isinstance(caption, list) else caption
        yield Item(
            id=str(line["question_id"]),
            text=line["text"],
            images=(line["image"],),
            references=(answers[line["question_id"]], context),
            metric=LLAVA_BENCH,
            suite="llava-bench",
            category=line["category"],
        )


def read_mm_vet(source: Path) -> Iterator[Item]:
    """MM-Vet (arXiv 2308.02490): `mm-vet.json`; the category names the capabilities, `math+ocr`."""
    for identity, entry in load(find(source, "mm-vet.json")).items():
        yield Item(
            id=identity,
            text=entry["question"],
            images=(entry["imagename"],),
            references=(entry["answer"],),
            metric=MM_VET,
            suite="mm-vet",
            category="+".join(sorted(entry["capability"])),
        )
