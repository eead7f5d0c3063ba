"""CHAIR (arXiv 1809.02156): which objects a caption mentions, and which of them are in the image.

    vocabulary = ObjectVocabulary({"dog": ["puppy"], "wine glass": ["glass"]})
    counts = score_caption("A puppy and two glasses.", present=["dog"], vocabulary=vocabulary)
    chair_scores([counts])     # CHAIR_i, CHAIR_s, recall, length

`docs/benchmark.md` lists where published scorers differ, and which of them is followed.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tita.bench.published_files import read_utf8
from tita.errors import TitaError

_TOKEN = re.compile(r"\w+|[^\w\s]")
_POSSESSIVE = re.compile(r"['\u2019]s\b")
_HYPHEN = re.compile(r"(?<=\w)-(?=\w)")
_IRREGULAR = {
    "man": "men", "person": "people", "child": "children", "mouse": "mice", "goose": "geese",
    "foot": "feet", "tooth": "teeth", "ox": "oxen", "knife": "knives", "loaf": "loaves",
    "calf": "calves", "wolf": "wolves", "shelf": "shelves", "leaf": "leaves", "half": "halves",
    "life": "lives", "scarf": "scarves", "thief": "thieves",
}  # fmt: skip
_ADDS_NO_E = ("photo", "piano", "video", "radio", "studio", "zoo", "limo", "rhino", "hippo")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionCounts:
    """What one caption mentions."""

    mentioned: tuple[str, ...]
    """The object of every mention, in order: an object that is mentioned twice stands twice."""
    hallucinated: tuple[str, ...]
    """The mentions of objects that are not in the image."""
    num_present: int
    """Number of objects in the image."""
    num_recalled: int
    """How many of them the caption mentions."""
    num_words: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChairScores:
    """Scores of captions as fractions; None where nothing can be divided."""

    num_captions: int
    chair_i: float | None
    """Hallucinated mentions by all mentions, over all captions together."""
    chair_s: float | None
    """Share of the captions that mention an object that is not in the image."""
    recall: float | None
    """Objects that captions mention by objects in their images, over all captions together."""
    length: float | None
    """Mean number of words. Shorter captions hallucinate less, so it belongs to every score."""


@dataclass(frozen=True, slots=True)
class ObjectVocabulary:
    """Objects by the phrases that name them.

    Singular and plural of a phrase are the same. Of several phrases at one place the longest
    counts; of several objects that list one phrase the last counts, as in the published scorer.
    """

    synonyms: Mapping[str, Iterable[str]]
    """Phrases by object; an object's own name is one of its phrases."""
    rules: Mapping[str, str] = field(default_factory=dict)
    """Further phrases, and the object of each; "" if the phrase names no object."""
    hidden_by: Mapping[str, str] = field(default_factory=dict)
    """Phrases that name no object in a caption that also has the other phrase."""
    _objects: dict[str, str] = field(init=False, repr=False, default_factory=dict)
    _phrases: dict[tuple[str, ...], str] = field(init=False, repr=False, default_factory=dict)
    """Phrases in the singular, by the words of their singular and plural."""

    def __post_init__(self) -> None:
        for name, listed in self.synonyms.items():
            self._objects.update(dict.fromkeys((name, *listed), name))
        self._objects.update(self.rules)
        # A listed phrase ("skis") is never taken for the plural of another one ("ski").
        self._phrases.update({tuple(words_of(phrase)): phrase for phrase in self._objects})
        for phrase in self._objects:
            self._phrases.setdefault(tuple(words_of(plural(phrase))), phrase)

    def mentions(self, caption: str) -> list[str]:
        """The object of every mention in a caption, in order."""
        words = words_of(caption)
        longest = max(map(len, self._phrases), default=1)
        phrases = []
        position = 0
        while position < len(words):
            for size in range(longest, 0, -1):
                phrase = self._phrases.get(tuple(words[position : position + size]))
                if phrase is not None:
                    phrases.append(phrase)
                    position += size - 1
                    break
            position += 1
        hidden = {phrase for phrase, other in self.hidden_by.items() if other in phrases}
        objects = [self._objects[phrase] for phrase in phrases if phrase not in hidden]
        return [name for name in objects if name]

    def object_of(self, phrase: str) -> str | None:
        """The object that a whole phrase names; None if it names none."""
        return self._objects.get(self._phrases.get(tuple(words_of(phrase)), "")) or None


def score_caption(
    caption: str, *, present: Iterable[str], vocabulary: ObjectVocabulary
) -> CaptionCounts:
    """Count the mentions of one caption.

    Args:
        present: the objects in the image, as keys of the vocabulary's `synonyms`.
    """
    objects = set(present)
    mentioned = vocabulary.mentions(caption)
    return CaptionCounts(
        mentioned=tuple(mentioned),
        hallucinated=tuple(name for name in mentioned if name not in objects),
        num_present=len(objects),
        num_recalled=len(objects & set(mentioned)),
        num_words=len(words_of(caption, punctuation=False)),
    )


def chair_scores(captions: Sequence[CaptionCounts]) -> ChairScores:
    """Scores of all captions together, as CHAIR's paper defines them."""
    num_mentioned = sum(len(counts.mentioned) for counts in captions)
    num_hallucinated = sum(len(counts.hallucinated) for counts in captions)
    num_present = sum(counts.num_present for counts in captions)
    return ChairScores(
        num_captions=len(captions),
        chair_i=_ratio(num_hallucinated, num_mentioned),
        chair_s=_ratio(sum(bool(counts.hallucinated) for counts in captions), len(captions)),
        recall=_ratio(sum(counts.num_recalled for counts in captions), num_present),
        length=_ratio(sum(counts.num_words for counts in captions), len(captions)),
    )


_ANIMALS = (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
    "animal", "cub",
)  # fmt: skip


def coco_vocabulary(synonyms: Mapping[str, Iterable[str]]) -> ObjectVocabulary:
    """The vocabulary of COCO's objects, with the special cases of CHAIR's paper.

    "Baby" and "adult" before an animal, and "passenger" before a jet or train, are no persons; a
    bow tie is a tie, a toilet's seat no chair, a home plate no plate, a train track no train.
    """
    known = {phrase: name for name, listed in synonyms.items() for phrase in (name, *listed)}
    rules = {f"{age} {a}": known.get(a, "") for age in ("baby", "adult") for a in _ANIMALS}
    rules |= {f"passenger {vehicle}": known.get(vehicle, "") for vehicle in ("jet", "train")}
    rules |= {"bow tie": known.get("tie", ""), "toilet seat": known.get("toilet", "")}
    rules |= {"home plate": "", "train track": ""}
    return ObjectVocabulary(synonyms, rules=rules, hidden_by={"seat": "toilet"})


def read_synonyms(path: Path) -> dict[str, list[str]]:
    """The synonym list of CHAIR, `data/synonyms.txt` of github.com/LisaAnne/Hallucination.

    A line is an object and its synonyms, separated by commas.

    Raises:
        TitaError: a line is empty in front, or the file has no objects.
    """
    synonyms: dict[str, list[str]] = {}
    for number, line in enumerate(read_utf8(path).splitlines(), start=1):
        phrases = [" ".join(phrase.lower().split()) for phrase in line.split(",")]
        if not any(phrases):
            continue
        if not phrases[0]:
            raise TitaError("the line has no object", where=f"{path}:{number}")
        listed = synonyms.setdefault(phrases[0], [])
        new = dict.fromkeys(phrase for phrase in phrases[1:] if phrase)
        listed += [phrase for phrase in new if phrase not in listed]
    if not synonyms:
        raise TitaError(
            "no objects",
            where=str(path),
            remedy="give CHAIR's data/synonyms.txt: an object and its synonyms per line",
        )
    return synonyms


def plural(phrase: str) -> str:
    """The plural of an English noun phrase: its last word in the plural."""
    start, space, noun = phrase.rpartition(" ")
    for single, several in _IRREGULAR.items():
        if noun == single or (single == "man" and noun.endswith("man") and noun != "human"):
            return f"{start}{space}{noun[: -len(single)]}{several}"
    if re.search(r"[^aeiou]y$", noun):
        noun = f"{noun[:-1]}ies"
    elif re.search(r"(?:s|x|z|ch|sh|[^aeiou]o)$", noun) and not noun.endswith(_ADDS_NO_E):
        noun += "es"
    else:
        noun += "s"
    return f"{start}{space}{noun}"


def words_of(text: str, *, punctuation: bool = True) -> list[str]:
    """Lower-case words without possessives, and punctuation marks, which separate phrases."""
    plain = _HYPHEN.sub(" ", _POSSESSIVE.sub("", text.lower()))
    tokens = _TOKEN.findall(plain)
    return tokens if punctuation else [token for token in tokens if token[0].isalnum()]


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
