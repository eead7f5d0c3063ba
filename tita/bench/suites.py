"""Readers of the published files of LLaVA-1.5's evaluation suites (arXiv 2310.03744).

Open answers: VQAv2, GQA, VizWiz, TextVQA. Yes/no: POPE, MME. Multiple choice: ScienceQA, MMBench,
SEED-Bench. Answers that a judge scores: LLaVA-Bench (in the wild), MM-Vet.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tita.bench.choice_answers import LETTERS
from tita.bench.fetched_images import ImageDownloads
from tita.bench.judge import LLAVA_BENCH, MM_VET
from tita.bench.llava_prompts import SHORT_PROMPT, with_options
from tita.bench.mmbench import read_mmbench
from tita.bench.published_files import find_file, load_json, load_lines, read_utf8
from tita.bench.questions import BenchmarkItem, read_items, write_items
from tita.bench.scoring import check_metric
from tita.data.dataset import write_image
from tita.errors import TitaError


def read_vqav2(source: Path) -> Iterator[BenchmarkItem]:
    """VQAv2 (arXiv 1612.00837): `v2_OpenEnded_*_questions.json`, `v2_*_annotations.json`.

    Images have COCO's names, `COCO_val2014_000000262148.jpg`. The test splits have no annotations,
    so their questions have no references.
    """
    questions = load_json(find_file(source, "v2_OpenEnded_*_questions.json"))
    split = questions["data_subtype"]
    answers = _vqav2_annotations(source, split=split)
    # The images of test-dev are in test2015.
    prefix = "test2015" if split.startswith("test") else split
    for entry in questions["questions"]:
        known = answers.get(entry["question_id"], {})
        if answers and not known:
            raise TitaError(
                f"question {entry['question_id']} has no annotation",
                where=str(source),
                remedy=f"give the annotations of {split}",
            )
        yield BenchmarkItem(
            id=str(entry["question_id"]),
            text=f"{entry['question']}\n{SHORT_PROMPT}",
            images=(f"COCO_{prefix}_{entry['image_id']:012d}.jpg",),
            references=tuple(answer["answer"] for answer in known.get("answers", ())),
            metric="vqa",
            suite="vqav2",
            category=known.get("answer_type", ""),
        )


def _vqav2_annotations(source: Path, *, split: str) -> dict[int, dict[str, Any]]:
    """Annotations by question id, from the file of the questions' split; empty without any."""
    published = sorted(source.glob("v2_*_annotations.json"))
    if not published or split.startswith("test"):
        return {}
    path = next((path for path in published if f"_{split}_" in path.name), None)
    if path is None:
        raise TitaError(
            f"no annotations of {split}, the split of the questions, but of "
            f"{', '.join(file.name for file in published)}",
            where=str(source),
            remedy=f"add v2_mscoco_{split}_annotations.json",
        )
    return {entry["question_id"]: entry for entry in load_json(path)["annotations"]}


def read_gqa(source: Path) -> Iterator[BenchmarkItem]:
    """GQA (arXiv 1902.09506): `testdev_balanced_questions.json` or another `*_questions.json`."""
    questions = load_json(find_file(source, "testdev_balanced_questions.json", "*_questions.json"))
    for identity, entry in questions.items():
        answer = entry.get("answer")
        yield BenchmarkItem(
            id=identity,
            text=f"{entry['question']}\n{SHORT_PROMPT}",
            images=(f"{entry['imageId']}.jpg",),
            references=() if answer is None else (answer,),
            metric="gqa",
            suite="gqa",
            category=(entry.get("types") or {}).get("structural", ""),
        )


def read_vizwiz(source: Path) -> Iterator[BenchmarkItem]:
    """VizWiz-VQA (arXiv 1802.08218): `val.json` or `test.json`, with LLaVA's prompt."""
    for entry in load_json(find_file(source, "val.json", "test.json")):
        yield BenchmarkItem(
            id=Path(entry["image"]).stem,
            text=(
                f"{entry['question']}\nWhen the provided information is insufficient, "
                f"respond with 'Unanswerable'.\n{SHORT_PROMPT}"
            ),
            images=(entry["image"],),
            references=tuple(answer["answer"] for answer in entry.get("answers", ())),
            metric="vqa",
            suite="vizwiz",
            category=entry.get("answer_type", ""),
        )


def read_textvqa(source: Path) -> Iterator[BenchmarkItem]:
    """TextVQA (arXiv 1904.08920): `TextVQA_0.5.1_val.json`.

    LLaVA's prompts include OCR tokens. They are read from `llava_textvqa_val_v051_ocr.jsonl` if it
    is in the same folder, and joined by image and question as LLaVA does. Without that file the
    prompt is the question only: another protocol, with another digest.
    """
    data = load_json(find_file(source, "TextVQA_*_val.json", "TextVQA_*.json"))["data"]
    prompts = {}
    for path in sorted(source.glob("llava_textvqa_*.jsonl")):
        for line in load_lines(path):
            question = str(line["text"]).split("\n")[0].lower()
            prompts[str(line["question_id"]), question] = str(line["text"])
    for entry in data:
        plain = f"{entry['question']}\n{SHORT_PROMPT}"
        key = str(entry["image_id"]), str(entry["question"]).lower()
        yield BenchmarkItem(
            id=str(entry["question_id"]),
            text=prompts.get(key, plain),
            images=(f"{entry['image_id']}.jpg",),
            references=tuple(entry.get("answers", ())),
            metric="vqa",
            suite="textvqa",
        )


_PLEASE = "Please answer yes or no."


def read_pope(source: Path) -> Iterator[BenchmarkItem]:
    """POPE (arXiv 2305.10355): `coco_pope_random.json`, `..._popular.json`, `..._adversarial.json`.

    The ids of each file start at 1, so they get the category as a prefix.
    """
    find_file(source, "*_pope_random.json", "*_pope_*.json")
    for path in sorted(source.glob("*_pope_*.json")):
        category = path.stem.rpartition("_pope_")[2]
        for entry in load_lines(path):
            yield BenchmarkItem(
                id=f"{category}-{entry['question_id']}",
                text=f"{entry['text']}\n{SHORT_PROMPT}",
                images=(entry["image"],),
                references=(entry["label"],),
                metric="yes-no",
                suite="pope",
                category=category,
            )


def read_mme(source: Path) -> Iterator[BenchmarkItem]:
    """MME (arXiv 2306.13394): one folder per task, with `<image>.txt` of question, tab, answer.

    Some tasks have them in `questions_answers_YN/` and their images in `images/`. LLaVA's protocol
    replaces MME's "Please answer yes or no." by its short-answer prompt.
    """
    found = False
    for path in sorted(source.glob("*/*.txt")) + sorted(
        source.glob("*/questions_answers_YN/*.txt")
    ):
        task = path.relative_to(source).parts[0]
        image = _image_of(path, source=source, task=task)
        for number, line in enumerate(read_utf8(path).splitlines(), start=1):
            if not line.strip():
                continue
            question, tab, answer = line.rpartition("\t")
            if not tab or answer.strip().lower() not in ("yes", "no"):
                raise TitaError("expected question, tab, Yes or No", where=f"{path}:{number}")
            found = True
            yield BenchmarkItem(
                id=f"{task}/{path.stem}-{number}",
                text=f"{question.replace(_PLEASE, '').strip()}\n{SHORT_PROMPT}",
                images=(image,),
                references=(answer.strip().lower(),),
                metric="mme",
                suite="mme",
                category=task,
                group=f"{task}/{path.stem}",
            )
    if not found:
        raise TitaError(
            "no task folders with text files",
            where=str(source),
            remedy="give the folder MME_Benchmark_release_version",
        )


def _image_of(path: Path, *, source: Path, task: str) -> str:
    for folder in (path.parent, source / task / "images", source / task):
        for ending in (".jpg", ".png", ".jpeg"):
            image = folder / f"{path.stem}{ending}"
            if image.is_file():
                return image.relative_to(source).as_posix()
    raise TitaError(f"no image for {path.name}", where=str(source / task))


def read_science_qa(source: Path, *, split: str = "test") -> Iterator[BenchmarkItem]:
    """ScienceQA (arXiv 2209.09513): `problems.json` and `pid_splits.json`, images in `<id>/`.

    The category is `image` or `text`: LLaVA reports questions with and without an image.
    """
    problems = load_json(find_file(source, "problems.json"))
    splits = load_json(find_file(source, "pid_splits.json"))
    if split not in splits:
        raise TitaError(
            f"no split {split!r}", where=str(source), remedy=f"choose one of {', '.join(splits)}"
        )
    for identity in splits[split]:
        entry = problems[identity]
        choices = tuple(entry["choices"])
        context = f"Context: {entry['hint']}\n" if entry.get("hint") else ""
        image = entry.get("image")
        yield BenchmarkItem(
            id=str(identity),
            text=with_options(f"{context}{entry['question']}", choices),
            images=(f"{identity}/{image}",) if image else (),
            references=(LETTERS[entry["answer"]],),
            choices=choices,
            metric="science-qa",
            suite="scienceqa",
            category="image" if image else "text",
        )


def read_seed_bench(source: Path) -> Iterator[BenchmarkItem]:
    """SEED-Bench (arXiv 2307.16125): `SEED-Bench.json`, images in `SEED-Bench-image/`.

    A video is represented by its middle frame, as in LLaVA-1.5, in
    `SEED-Bench-video-image/<question id>.png`. The published code ranks options by likelihood; an
    endpoint is asked for the letter, as in LLaVA.
    """
    data = load_json(find_file(source, "SEED-Bench.json", "SEED-Bench*.json"))
    kinds = {number: name for name, number in data.get("question_type", {}).items()}
    for entry in data["questions"]:
        choices = tuple(entry[f"choice_{letter}"] for letter in "abcd")
        if entry["data_type"] == "video":
            medium, image = "video", f"SEED-Bench-video-image/{entry['question_id']}.png"
        else:
            medium, image = "image", f"SEED-Bench-image/{entry['data_id']}"
        kind = kinds.get(entry["question_type_id"], str(entry["question_type_id"]))
        yield BenchmarkItem(
            id=str(entry["question_id"]),
            text=with_options(entry["question"], choices),
            images=(image,),
            references=(entry["answer"],),
            choices=choices,
            metric="choice",
            suite="seed-bench",
            # `image+...` or `video+...`: scores are reported by medium and by type.
            category=f"{medium}+{kind}",
        )


def read_llava_bench(source: Path) -> Iterator[BenchmarkItem]:
    """LLaVA-Bench (arXiv 2304.08485): `questions.jsonl`, `answers_gpt4.jsonl`, `context.jsonl`.

    The references are the answer of the text-only GPT-4 and the caption that it was given.
    """
    answers = {
        line["question_id"]: line["text"]
        for line in load_lines(find_file(source, "answers_gpt4.jsonl"))
    }
    captions = {
        line["image"]: line["caption"] for line in load_lines(find_file(source, "context.jsonl"))
    }
    for line in load_lines(find_file(source, "questions.jsonl")):
        caption = captions[line["image"]]
        context = "\n".join(caption) if isinstance(caption, list) else caption
        yield BenchmarkItem(
            id=str(line["question_id"]),
            text=line["text"],
            images=(line["image"],),
            references=(answers[line["question_id"]], context),
            metric=LLAVA_BENCH,
            suite="llava-bench",
            category=line["category"],
        )


def read_mm_vet(source: Path) -> Iterator[BenchmarkItem]:
    """MM-Vet (arXiv 2308.02490): `mm-vet.json`; the category names the capabilities, `math+ocr`."""
    for identity, entry in load_json(find_file(source, "mm-vet.json")).items():
        yield BenchmarkItem(
            id=identity,
            text=entry["question"],
            images=(entry["imagename"],),
            references=(entry["answer"],),
            metric=MM_VET,
            suite="mm-vet",
            category="+".join(sorted(entry["capability"])),
        )


SUITES: Mapping[str, Callable[[Path], Iterator[BenchmarkItem]]] = {
    "gqa": read_gqa,
    "llava-bench": read_llava_bench,
    "mm-vet": read_mm_vet,
    "mme": read_mme,
    "pope": read_pope,
    "scienceqa": read_science_qa,
    "seed-bench": read_seed_bench,
    "textvqa": read_textvqa,
    "vizwiz": read_vizwiz,
    "vqav2": read_vqav2,
}
"""All suites except MMBench, whose reader also writes images."""


def suite_names() -> list[str]:
    """Names of all suites, sorted."""
    return sorted([*SUITES, "mmbench"])


def _read(
    suite: str, *, source: Path, images: Path, downloads: ImageDownloads | None
) -> Iterator[BenchmarkItem]:
    if suite == "unpack":
        return _unpack(source, images=images, downloads=downloads)
    if suite == "mmbench":
        return read_mmbench(source, images=images)
    if suite not in SUITES:
        raise TitaError(
            f"unknown suite {suite!r}", remedy=f"choose one of {', '.join(suite_names())}, unpack"
        )
    return SUITES[suite](source)


def _unpack(
    source: Path, *, images: Path, downloads: ImageDownloads | None
) -> Iterator[BenchmarkItem]:
    """Questions whose embedded images are written to files, and those named by URL fetched."""
    write = partial(write_image, into=images)
    items = read_items(source, write_image=write, urls=downloads is not None)
    return items if downloads is None else downloads.replace_urls(items)


def prepare(
    suite: str,
    *,
    source: Path,
    out: Path,
    metric: str = "",
    downloads: ImageDownloads | None = None,
) -> int:
    """Convert the published files of a suite to a question file; returns the number of questions.

    Args:
        suite: one of `suite_names`; or `unpack`, for questions with images embedded in their rows.
        source: folder of the published files; for `unpack` a file or folder of questions.
        out: question file to write. The images of MMBench and `unpack` are written to its folder;
            the image paths of other suites are those of the published images.
        metric: metric of the questions; empty for the suite's own.
        downloads: of images that the questions of `unpack` name by URL, into the folder of `out`;
            without it such questions are an error.

    Raises:
        TitaError: the suite is unknown, a file is missing, or a record has another format.
    """
    if not (source.is_dir() or (suite == "unpack" and source.is_file())):
        raise TitaError("no such folder", where=str(source), remedy="check --source")
    check_metric(metric, where="--metric")
    if downloads is not None and suite != "unpack":
        raise TitaError(
            f"--fetch-images is for unpack: {suite} has its images in files",
            remedy="omit --fetch-images",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        items = _read(suite, source=source, images=out.parent, downloads=downloads)
        return write_items(out, (replace(i, metric=metric) for i in items) if metric else items)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise TitaError(
            f"a record does not have {suite}'s published format ({type(error).__name__}: {error})",
            where=str(source),
        ) from error
