"""Open answers: VQAv2, GQA, VizWiz, TextVQA."""

from collections.abc import Iterator
from pathlib import Path

from tita.bench.items import Item
from tita.bench.suites.source import SHORT, find, load, load_lines


def read_vqav2(source: Path) -> Iterator[Item]:
    """VQAv2 (arXiv 1612.00837): `v2_OpenEnded_*_questions.json`, `v2_*_annotations.json`.

    Images are named as COCO names them, `COCO_val2014_000000262148.jpg`. The test splits have no
    annotations; their questions are read without references.
    """
    questions = load(find(source, "v2_OpenEnded_*_questions.json"))
    split = questions["data_subtype"]
    published = sorted(source.glob("v2_*_annotations.json"))
    annotations = load(published[0])["annotations"] if published else []
    answers = {entry["question_id"]: entry for entry in annotations}
    # test-dev asks about images of test2015.
    prefix = "test2015" if split.startswith("test") else split
    for entry in questions["questions"]:
        known = answers.get(entry["question_id"], {})
        yield Item(
            id=str(entry["question_id"]),
            text=f"{entry['question']}\n{SHORT}",
            images=(f"COCO_{prefix}_{entry['image_id']:012d}.jpg",),
            references=tuple(answer["answer"] for answer in known.get("answers", ())),
            metric="vqa",
            suite="vqav2",
            category=known.get("answer_type", ""),
        )


def read_gqa(source: Path) -> Iterator[Item]:
    """GQA (arXiv 1902.09506): `testdev_balanced_questions.json` or another `*_questions.json`."""
    questions = load(find(source, "testdev_balanced_questions.json", "*_questions.json"))
    for identity, entry in questions.items():
        answer = entry.get("answer")
        yield Item(
            id=identity,
            text=f"{entry['question']}\n{SHORT}",
            images=(f"{entry['imageId']}.jpg",),
            references=() if answer is None else (answer,),
            metric="gqa",
            suite="gqa",
            category=(entry.get("types") or {}).get("structural", ""),
        )


def read_vizwiz(source: Path) -> Iterator[Item]:
    """VizWiz-VQA (arXiv 1802.08218): `val.json` or `test.json`, and LLaVA's prompt for it."""
    for entry in load(find(source, "val.json", "test.json")):
        yield Item(
            id=Path(entry["image"]).stem,
            text=(
                f"{entry['question']}\nWhen the provided information is insufficient, "
                f"respond with 'Unanswerable'.\n{SHORT}"
            ),
            images=(entry["image"],),
            references=tuple(answer["answer"] for answer in entry.get("answers", ())),
            metric="vqa",
            suite="vizwiz",
            category=entry.get("answer_type", ""),
        )


def read_textvqa(source: Path) -> Iterator[Item]:
    """TextVQA (arXiv 1904.08920): `TextVQA_0.5.1_val.json`.

    LLaVA's protocol shows the model OCR tokens. Its prompts are taken from
    `llava_textvqa_val_v051_ocr.jsonl` where that lies beside, joined by image and question as LLaVA
    does. Without it the question stands alone: another protocol, with another digest.
    """
    data = load(find(source, "TextVQA_*_val.json", "TextVQA_*.json"))["data"]
    prompts = {}
    for path in sorted(source.glob("llava_textvqa_*.jsonl")):
        for line in load_lines(path):
            question = str(line["text"]).split("\n")[0].lower()
            prompts[str(line["question_id"]), question] = str(line["text"])
    for entry in data:
        plain = f"{entry['question']}\n{SHORT}"
        key = str(entry["image_id"]), str(entry["question"]).lower()
        yield Item(
            id=str(entry["question_id"]),
            text=prompts.get(key, plain),
            images=(f"{entry['image_id']}.jpg",),
            references=tuple(entry.get("answers", ())),
            metric="vqa",
            suite="textvqa",
        )
