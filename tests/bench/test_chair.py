"""CHAIR: hand-worked captions with traps, and a second implementation on random captions."""

import random
import re
from pathlib import Path

import pytest

from tita.bench.chair import (
    CaptionCounts,
    ObjectVocabulary,
    chair_scores,
    coco_vocabulary,
    plural,
    read_synonyms,
    score_caption,
)
from tita.errors import TitaError

SYNONYMS = {
    "person": ["man", "woman", "child", "people", "baby", "passenger", "adult"],
    "dog": ["puppy"],
    "cat": ["kitten"],
    "train": ["locomotive"],
    "airplane": ["plane", "jet"],
    "chair": ["seat", "stool"],
    "toilet": ["commode"],
    "tie": [],
    "wine glass": ["goblet"],
    "cup": ["glass", "mug"],
    "bus": [],
    "skis": ["ski"],
    "knife": [],
    "hot dog": ["sausage"],
    "teddy bear": ["teddy"],
    "bear": [],
    "fire hydrant": ["hydrant"],
    "scissors": [],
    "dining table": ["table", "desk"],
}
COCO = coco_vocabulary(SYNONYMS)


@pytest.mark.parametrize(
    ("caption", "mentioned"),
    [
        ("A dog and two puppies.", ["dog", "dog"]),
        ("Two MEN, a woman's cat", ["person", "person", "cat"]),
        ("a hot dog on a plate", ["hot dog"]),  # no dog
        ("It is hot. Dogs rest.", ["dog"]),  # no hot dog over the end of a sentence
        ("a teddy-bear; a brown bear", ["teddy bear", "bear"]),
        ("wine glasses and glasses", ["wine glass", "cup"]),
        ("a baby bear, an adult dog and a baby", ["bear", "dog", "person"]),
        ("a passenger train, a passenger", ["train", "person"]),
        ("a train track beside the home plate", []),
        ("a toilet with its seat up", ["toilet"]),
        ("the toilet seats", ["toilet"]),
        ("a seat at the dining table", ["chair", "dining table"]),
        ("a bow tie, and a tie", ["tie", "tie"]),
        ("buses, a bus", ["bus", "bus"]),  # "bus" is no plural
        ("a ski, skis, scissors and knives", ["skis", "skis", "scissors", "knife"]),
        ("dogma, cathedral, manly, planet", []),  # words that begin like objects
        ("fire hydrants. A hydrant", ["fire hydrant", "fire hydrant"]),
        ("", []),
    ],
)
def test_mentions(caption: str, mentioned: list[str]) -> None:
    assert COCO.mentions(caption) == mentioned


def test_scores_by_hand() -> None:
    """Three captions: 2 of 6 mentions, 1 of 3 captions, 3 of 5 objects, 18 words."""
    captions = [
        score_caption("A dog chases a dog and a cat, a kitten.", present=["dog"], vocabulary=COCO),
        score_caption(
            "A man at a table.", present=["person", "dining table", "cup"], vocabulary=COCO
        ),
        score_caption("Nothing is here.", present=["bus"], vocabulary=COCO),
    ]
    assert captions[0] == CaptionCounts(
        mentioned=("dog", "dog", "cat", "cat"),
        hallucinated=("cat", "cat"),
        num_present=1,
        num_recalled=1,
        num_words=10,
    )
    scores = chair_scores(captions)
    assert scores.num_captions == 3
    assert scores.chair_i == pytest.approx(2 / 6)
    assert scores.chair_s == pytest.approx(1 / 3)
    assert scores.recall == pytest.approx(3 / 5)
    assert scores.length == pytest.approx((10 + 5 + 3) / 3)


def test_no_mention_is_no_score() -> None:
    scores = chair_scores([score_caption("Grass.", present=[], vocabulary=COCO)])
    assert (scores.chair_i, scores.chair_s, scores.recall, scores.length) == (None, 0, None, 1)
    assert chair_scores([]).chair_s is None


def test_an_empty_caption_hallucinates_nothing_and_finds_nothing() -> None:
    counts = score_caption(" ", present=["dog"], vocabulary=COCO)
    assert (counts.mentioned, counts.num_recalled, counts.num_words) == ((), 0, 0)


def test_categories_are_found_by_any_of_their_phrases() -> None:
    assert COCO.object_of("dogs") == "dog"
    assert COCO.object_of("Table") == "dining table"
    assert COCO.object_of("dog table") is None
    assert COCO.object_of("home plate") is None


def test_of_two_objects_with_one_phrase_the_last_counts() -> None:
    vocabulary = ObjectVocabulary({"cup": ["glass"], "window": ["glass"]})
    assert vocabulary.mentions("a glass") == ["window"]


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("dog", "dogs"), ("wine glass", "wine glasses"), ("fireman", "firemen"),
        ("baby", "babies"), ("boy", "boys"), ("knife", "knives"), ("couch", "couches"),
        ("potato", "potatoes"), ("limo", "limos"), ("zoo", "zoos"), ("sheep dog", "sheep dogs"),
        ("3", "3s"), ("box", "boxes"), ("person", "people"), ("human", "humans"),
    ],
)  # fmt: skip
def test_plural(phrase: str, expected: str) -> None:
    assert plural(phrase) == expected


def test_synonym_list(tmp_path: Path) -> None:
    path = tmp_path / "synonyms.txt"
    path.write_text("person, girl, boy,girl\n\nmotorcycle,  motor bike, scooter\n")
    assert read_synonyms(path) == {
        "person": ["girl", "boy"], "motorcycle": ["motor bike", "scooter"],
    }  # fmt: skip
    path.write_text("person\n, dog\n")
    with pytest.raises(TitaError, match=r"no object"):
        read_synonyms(path)
    path.write_text("\n")
    with pytest.raises(TitaError, match="no objects"):
        read_synonyms(path)


def second_implementation(captions: list[str], present: list[set[str]]) -> list[float]:
    """CHAIR with one regular expression of all phrases in the place of a table of words."""
    phrases = {p: name for name, listed in SYNONYMS.items() for p in (name, *listed)}
    phrases |= {f"{age} {a}": a for age in ("baby", "adult") for a in ("dog", "cat", "bear")}
    phrases |= {"passenger train": "train", "passenger jet": "airplane", "train track": ""}
    phrases |= {"bow tie": "tie", "toilet seat": "toilet", "home plate": ""}
    several = {"man": "men", "woman": "women", "child": "children", "person": "people"}
    several |= {"puppy": "puppies", "baby": "babies", "bus": "buses", "knife": "knives"}
    several |= {"teddy": "teddies"}
    forms = {p: p for p in phrases}
    for phrase in phrases:
        start, space, last = phrase.rpartition(" ")
        form = several.get(last) or re.sub("(s|x|ch|sh)$", r"\1e", last) + "s"
        forms.setdefault(f"{start}{space}{form}", phrase)
    ordered = sorted(forms, key=lambda form: -len(form.split()))
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, ordered))})(?!\w)", re.I)
    mentions = wrong = captions_wrong = found = total = words = 0
    for caption, objects in zip(captions, present, strict=True):
        marks = [forms[hit.lower()] for hit in pattern.findall(caption)]
        if "toilet" in marks:
            marks = [m for m in marks if m != "seat"]
        names = [phrases[m] for m in marks if phrases[m]]
        bad = [n for n in names if n not in objects]
        mentions, wrong = mentions + len(names), wrong + len(bad)
        captions_wrong += bool(bad)
        found, total = found + len(objects & set(names)), total + len(objects)
        words += len(re.findall(r"\w+", caption))
    return [wrong / mentions, captions_wrong / len(captions), found / total, words / len(captions)]


def test_equals_a_second_implementation_on_500_captions() -> None:
    draw = random.Random(0)
    listed = [p for name, others in SYNONYMS.items() for p in (name, *others)]
    listed += [plural(p) for p in listed if p not in ("people", "skis", "scissors")]
    listed += ["baby bear", "adult cat", "passenger train", "bow tie", "toilet seat", "home plate"]
    listed += ["train track", "cathedral", "grass", "hot", "wine", "of a", "near the", "baby", "."]
    captions = [" ".join(draw.choices(listed, k=draw.randint(0, 14))) for _ in range(500)]
    present = [set(draw.sample(sorted(SYNONYMS), k=draw.randint(0, 6))) for _ in range(500)]
    scores = chair_scores(
        [
            score_caption(caption, present=objects, vocabulary=COCO)
            for caption, objects in zip(captions, present, strict=True)
        ]
    )
    expected = second_implementation(captions, present)
    assert [scores.chair_i, scores.chair_s, scores.recall, scores.length] == pytest.approx(expected)
    assert all(0.1 < value < 0.95 for value in expected[:3])
