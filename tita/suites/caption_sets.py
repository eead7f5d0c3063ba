"""Sets that judge captions by the objects that they mention: CHAIR, Object HalBench, AMBER.

CHAIR: arXiv 1809.02156, on COCO's images. Object HalBench: arXiv 1809.02156 with the 300 images and
eight prompts of RLHF-V (arXiv 2312.00849). AMBER: arXiv 2311.07397.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from tita.bench.chair import (
    ObjectVocabulary,
    coco_vocabulary,
    plural,
    read_synonyms,
    score_caption,
    words_of,
)
from tita.bench.published_files import find_file, load_json, load_lines, read_utf8
from tita.bench.questions import BenchmarkItem
from tita.bench.scoring import AMBER_CAPTION, CHAIR
from tita.data.dataset import write_image
from tita.data.embedded_images import decode_base64, embedded_content
from tita.errors import TitaError
from tita.suites.paired_totals import Array, Totals
from tita.suites.scorers import (
    LENGTH,
    YES_RATIO,
    Figure,
    QuestionCounts,
    ScoredQuestion,
    Scorer,
    f1_of,
    ratio,
    read_vocabulary,
    write_vocabulary,
    yes_no_counts,
)

CHAIR_IMAGES = 500
"""Images of CHAIR that papers on VLMs take of COCO's val2014."""
CHAIR_PROMPT = "Please describe this image in detail."


def read_chair(source: Path, *, out: Path) -> Iterator[BenchmarkItem]:
    """CHAIR on COCO: `instances_*.json`, `captions_*.json`, `synonyms.txt`.

    The objects in an image are those of its instances and of its five captions, as in the paper.
    The images are those listed in `images.txt` (names or ids, one per line), by default 500 that
    are drawn with seed 0 from all that have instances. Papers draw other 500, so that scores of
    different draws are not comparable.

    Raises:
        TitaError: a file is missing, or names an image or a category that is not known.
    """
    synonyms = read_synonyms(find_file(source, "synonyms.txt", "synonyms*.txt"))
    vocabulary = coco_vocabulary(synonyms)
    instances = [load_json(path) for path in _all(source, "instances_*.json")]
    captions = [load_json(path) for path in _all(source, "captions_*.json")]
    names = {image["id"]: image["file_name"] for each in instances for image in each["images"]}
    present: dict[int, set[str]] = {}
    for each in instances:
        categories = {c["id"]: _category(c["name"], vocabulary) for c in each["categories"]}
        for annotation in each["annotations"]:
            objects = present.setdefault(annotation["image_id"], set())
            objects.add(categories[annotation["category_id"]])
    chosen = _chosen_images(source, names=names, known=present)
    for each in captions:
        for annotation in each["annotations"]:
            if annotation["image_id"] in chosen:
                objects = present.setdefault(annotation["image_id"], set())
                objects.update(vocabulary.mentions(annotation["caption"]))
    write_vocabulary(out, "chair", {"synonyms": synonyms})
    for identity in chosen:
        yield BenchmarkItem(
            id=str(identity),
            text=CHAIR_PROMPT,
            images=(names[identity],),
            references=tuple(sorted(present.get(identity, ()))),
            metric=CHAIR,
            suite="chair",
        )


def _all(source: Path, pattern: str) -> list[Path]:
    found = sorted(source.glob(pattern))
    if not found:
        raise TitaError(
            f"no {pattern} in the folder",
            where=str(source),
            remedy="give COCO's annotations of 2014 and CHAIR's data/synonyms.txt",
        )
    return found


def _category(name: str, vocabulary: ObjectVocabulary) -> str:
    found = vocabulary.object_of(name)
    if found is None:
        raise TitaError(
            f"the category {name!r} is in no line of the synonym list",
            remedy="give the synonym list of the same objects",
        )
    return found


def _chosen_images(
    source: Path, *, names: Mapping[int, str], known: Iterable[int]
) -> dict[int, None]:
    """Ids of the images that are asked about, in order."""
    listed = source / "images.txt"
    if not listed.is_file():
        ids = sorted(known)
        drawn = random.Random(0).sample(ids, min(CHAIR_IMAGES, len(ids)))
        return dict.fromkeys(sorted(drawn))
    by_name = {name: identity for identity, name in names.items()}
    chosen: dict[int, None] = {}
    for number, line in enumerate(read_utf8(listed).splitlines(), start=1):
        name = line.strip()
        if not name:
            continue
        identity = int(name) if name.isdecimal() else by_name.get(name)
        if identity is None or identity not in names:
            raise TitaError(f"no image {name!r} in the instances", where=f"{listed}:{number}")
        chosen[identity] = None
    return chosen


def read_object_halbench(source: Path, *, out: Path) -> Iterator[BenchmarkItem]:
    """Object HalBench: `obj_halbench_300*.jsonl` of RLHF-V, COCO's annotations, the synonym list.

    A line has `question`, `image_id`, and `image` in base64 or as a file. The published evaluation
    has GPT-3.5 list the objects of a caption and looks those up in the synonym list; here the list
    is looked up in the caption, as CHAIR does, which needs no judge.

    Raises:
        TitaError: a file is missing or has another format.
    """
    synonyms = read_synonyms(find_file(source, "synonyms_refine.txt", "synonyms*.txt"))
    vocabulary = coco_vocabulary(synonyms)
    present = _boxes_and_captions(source, vocabulary)
    write_vocabulary(out, "object-halbench", {"synonyms": synonyms})
    path = find_file(source, "obj_halbench_300*.jsonl", "obj_halbench*.jsonl")
    for number, line in enumerate(load_lines(path), start=1):
        identity = int(line["image_id"])
        if identity not in present:
            raise TitaError(f"no annotations of image {identity}", where=f"{path}:{number}")
        image = str(line.get("image") or f"COCO_val2014_{identity:012d}.jpg")
        encoded = embedded_content(image)
        content = decode_base64(encoded) if encoded else None
        yield BenchmarkItem(
            id=f"{identity}-{number}",
            text=str(line["question"]),
            images=(image if content is None else write_image(content, into=out),),
            references=tuple(sorted(present[identity])),
            metric=CHAIR,
            suite="object-halbench",
        )


def _boxes_and_captions(source: Path, vocabulary: ObjectVocabulary) -> dict[int, set[str]]:
    """Objects by image, from COCO's annotations or from RLHF-V's extract of them."""
    present: dict[int, set[str]] = {}
    extract = sorted(source.glob("caps_boxes_coco*.jsonl"))
    if extract:
        for line in load_lines(extract[0]):
            objects = present.setdefault(int(line["id"]), set())
            objects.update(_category(box["category"], vocabulary) for box in line["instances"])
            for caption in line["captions"]:
                objects.update(vocabulary.mentions(caption))
        return present
    for path in _all(source, "instances_*.json"):
        content = load_json(path)
        categories = {c["id"]: _category(c["name"], vocabulary) for c in content["categories"]}
        for annotation in content["annotations"]:
            objects = present.setdefault(annotation["image_id"], set())
            objects.add(categories[annotation["category_id"]])
    for path in _all(source, "captions_*.json"):
        for annotation in load_json(path)["annotations"]:
            objects = present.setdefault(annotation["image_id"], set())
            objects.update(vocabulary.mentions(annotation["caption"]))
    return present


def _load_chair(name: str, folder: Path) -> QuestionCounts:
    vocabulary = coco_vocabulary(read_vocabulary(folder, name)["synonyms"])

    def count(question: ScoredQuestion) -> dict[str, float]:
        counts = score_caption(question.answer, present=question.references, vocabulary=vocabulary)
        return {
            "score": float(not counts.hallucinated),
            "mentions": float(len(counts.mentioned)),
            "mentioning": float(bool(counts.mentioned)),
            "made up": float(len(counts.hallucinated)),
            "captions wrong": float(bool(counts.hallucinated)),
            "recalled": float(counts.num_recalled),
            "present": float(counts.num_present),
        }

    return count


_CHAIR_I = Figure(value=ratio("made up", "mentions"), better=-1)
_RECALL = Figure(value=ratio("recalled", "present"))

CHAIR_SCORER = Scorer(
    load=partial(_load_chair, "chair"),
    figures={
        "CHAIR_i": _CHAIR_I,
        "CHAIR_s": Figure(value=ratio("captions wrong", "questions"), better=-1),
        "recall": _RECALL,
        "length in words": LENGTH,
    },
)
OBJECT_HALBENCH_SCORER = Scorer(
    load=partial(_load_chair, "object-halbench"),
    # Several prompts are about one image.
    unit=lambda question: question.image,
    figures={
        # Of the answers that mention an object, as in RLHF-V's evaluation.
        "responses wrong": Figure(value=ratio("captions wrong", "mentioning"), better=-1),
        "objects wrong": _CHAIR_I,
        "recall": _RECALL,
        "length in words": LENGTH,
    },
)

_YES_NO_PROMPT = "Please answer yes or no."
_DIMENSIONS = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "attribute",
    "discriminative-attribute-number": "attribute",
    "discriminative-attribute-action": "attribute",
    "discriminative-relation": "relation",
    "relation": "relation",
}


def read_amber(source: Path, *, out: Path) -> Iterator[BenchmarkItem]:
    """AMBER: `data/annotations.json`, `data/relation.json`, `data/safe_words.txt`, `data/query/`.

    The queries are those of `query_all.json`, else of the other files. A caption's references are
    the objects in its image, its choices those that models make up for it.

    Raises:
        TitaError: a file is missing, or a query has no annotation.
    """
    data = source / "data" if (source / "data").is_dir() else source
    annotations = {entry["id"]: entry for entry in load_json(find_file(data, "annotations.json"))}
    words = load_json(find_file(data, "relation.json"))
    safe = [line.strip() for line in read_utf8(find_file(data, "safe_words.txt")).splitlines()]
    write_vocabulary(out, "amber", {"association": words, "safe": [word for word in safe if word]})
    queries = data / "query" if (data / "query").is_dir() else data
    paths = sorted(queries.glob("query_all.json")) or sorted(queries.glob("query_*.json"))
    if not paths:
        raise TitaError("no query_*.json", where=str(queries), remedy="give AMBER's data folder")
    entries = {entry["id"]: entry for path in paths for entry in load_json(path)}
    for identity, entry in sorted(entries.items()):
        known = annotations.get(identity)
        if known is None:
            raise TitaError(f"query {identity} has no annotation", where=str(data))
        is_caption = known["type"] == "generative"
        ending = "" if is_caption else f"\n{_YES_NO_PROMPT}"
        yield BenchmarkItem(
            id=str(identity),
            text=f"{entry['query']}{ending}",
            images=(entry["image"],),
            references=tuple(known["truth"]) if is_caption else (known["truth"],),
            choices=tuple(known["hallu"]) if is_caption else (),
            metric=AMBER_CAPTION if is_caption else "yes-no",
            suite="amber",
            category="generative" if is_caption else _DIMENSIONS[known["type"]],
        )


def _load_amber(folder: Path) -> QuestionCounts:
    content = read_vocabulary(folder, "amber")
    caption = AmberCaption(content["association"], safe=content["safe"])

    def count(question: ScoredQuestion) -> dict[str, float]:
        if question.metric == AMBER_CAPTION:
            return caption.count(question.answer, truth=question.references, hallu=question.choices)
        counts = yes_no_counts(question)
        kind = question.category
        names = ("yes/no", "said no", "labelled no", "no hits", "score")
        return counts | {
            "right": counts["score"],
            **{f"{kind}: {name}": counts[name] for name in names},
        }

    return count


class AmberCaption:
    """AMBER's rules for captions (`inference.py` of github.com/junyangwang0410/AMBER).

    A word of the association list counts, singular or plural, each time that it stands in the
    caption. It is right if it is an object of the image, associated with one, or a safe word. The
    published code takes only words that a tagger calls nouns, and accepts further words whose
    spaCy vectors are closer than 0.8 to an object's; neither model is needed here.
    """

    def __init__(self, association: Mapping[str, Sequence[str]], *, safe: Iterable[str]) -> None:
        self._association = association
        self._safe = frozenset(safe)
        listed = [*association, *(word for words in association.values() for word in words)]
        self._forms = {plural(word): word for word in listed} | {word: word for word in listed}

    def count(self, answer: str, *, truth: Sequence[str], hallu: Sequence[str]) -> dict[str, float]:
        """Counts of one caption."""
        found = [self._forms[word] for word in words_of(answer) if word in self._forms]
        truth_of, hallu_of = self._owners(truth), self._owners(hallu)
        covered, cognition, made_up = set(), set(), 0
        for word in found:
            if word in self._safe:
                continue
            if word in truth_of:
                covered.add(truth_of[word])
                continue
            if word in hallu_of:
                cognition.add(hallu_of[word])
            made_up += 1
        return {
            "score": float(not made_up),
            "captions": 1.0,
            "mentions": float(len(found)),
            "made up": float(made_up),
            "captions wrong": float(bool(made_up)),
            "covered": float(len(covered)),
            "truth": float(len(truth)),
            "cognition": float(len(cognition)),
            "hallu": float(len(hallu)),
            "caption words": float(len(answer.split())),
        }

    def _owners(self, objects: Sequence[str]) -> dict[str, int]:
        """Place in the list of the object that a word stands for.

        As in the published code, an associated word counts for the first object that it is
        associated with even if it is an object of the list itself, and of equal objects the first.
        """
        owners: dict[str, int] = {}
        for place, name in enumerate(objects):
            for word in self._association.get(name, ()):
                owners.setdefault(word, place)
        for place, name in enumerate(objects):
            owners.setdefault(name, place)
        return owners


def _amber_score(totals: Totals) -> Array:
    """(100 - CHAIR + F1) / 2."""
    return (100 - _AMBER_CHAIR(totals) + _AMBER_F1(totals)) / 2


_AMBER_CHAIR = ratio("made up", "mentions")
_AMBER_F1 = f1_of("no hits", "said no", "labelled no")


def _amber_f1(kind: str) -> Figure:
    return Figure(value=f1_of(f"{kind}: no hits", f"{kind}: said no", f"{kind}: labelled no"))


AMBER_SCORER = Scorer(
    load=_load_amber,
    # All questions about one image depend on each other.
    unit=lambda question: question.image,
    figures={
        "AMBER score": Figure(value=_amber_score),
        "CHAIR": Figure(value=_AMBER_CHAIR, better=-1),
        "cover": Figure(value=ratio("covered", "truth")),
        "hal": Figure(value=ratio("captions wrong", "captions"), better=-1),
        "cog": Figure(value=ratio("cognition", "hallu"), better=-1),
        "accuracy": Figure(value=ratio("right", "yes/no")),
        # "No" is the positive class.
        "precision": Figure(value=ratio("no hits", "said no")),
        "recall": Figure(value=ratio("no hits", "labelled no")),
        "F1": Figure(value=_AMBER_F1),
        "F1 existence": _amber_f1("existence"),
        "F1 attribute": _amber_f1("attribute"),
        "F1 relation": _amber_f1("relation"),
        "yes ratio": YES_RATIO,
        "caption length in words": Figure(
            value=ratio("caption words", "captions", factor=1.0), better=0
        ),
    },
)
"""AMBER's figures; a folder with one kind of query only has those of that kind."""
