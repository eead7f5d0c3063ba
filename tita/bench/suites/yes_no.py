"""Yes/no questions: POPE and MME."""

from collections.abc import Iterator
from pathlib import Path

from tita.bench.items import Item
from tita.bench.suites.source import SHORT, find, load_lines
from tita.errors import TitaError

_PLEASE = "Please answer yes or no."


def read_pope(source: Path) -> Iterator[Item]:
    """POPE (arXiv 2305.10355): `coco_pope_random.json`, `..._popular.json`, `..._adversarial.json`.

    Ids start anew in each file, so the category goes before them.
    """
    find(source, "*_pope_random.json", "*_pope_*.json")
    for path in sorted(source.glob("*_pope_*.json")):
        category = path.stem.rpartition("_pope_")[2]
        for entry in load_lines(path):
            yield Item(
                id=f"{category}-{entry['question_id']}",
                text=f"{entry['text']}\n{SHORT}",
                images=(entry["image"],),
                references=(entry["label"],),
                metric="yes-no",
                suite="pope",
                category=category,
            )


def read_mme(source: Path) -> Iterator[Item]:
    """MME (arXiv 2306.13394): a folder a task, with `<image>.txt` of question, tab, answer a line.

    Some tasks keep them in `questions_answers_YN/` and their images in `images/`. LLaVA's protocol
    puts its short-answer prompt in the place of MME's own "Please answer yes or no.".
    """
    found = False
    for path in sorted(source.glob("*/*.txt")) + sorted(
        source.glob("*/questions_answers_YN/*.txt")
    ):
        task = path.relative_to(source).parts[0]
        image = _image_of(path, source=source, task=task)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            question, tab, answer = line.rpartition("\t")
            if not tab or answer.strip().lower() not in ("yes", "no"):
                raise TitaError("not question, tab, Yes or No", where=f"{path}:{number}")
            found = True
            yield Item(
                id=f"{task}/{path.stem}-{number}",
                text=f"{question.replace(_PLEASE, '').strip()}\n{SHORT}",
                images=(image,),
                references=(answer.strip().lower(),),
                metric="mme",
                suite="mme",
                category=task,
                group=f"{task}/{path.stem}",
            )
    if not found:
        raise TitaError(
            "no task folders with text files in it",
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
