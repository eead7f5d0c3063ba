"""Normalises answers as EvalAI does for the VQA challenge before it compares them.

The rules and tables are those of the VQA evaluation code (arXiv 1505.00468,
github.com/GT-Vision-Lab/VQA) in the form that TextVQA (arXiv 1904.08920) and LLaVA-1.5 score with.
"""

import re
from functools import lru_cache

_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
_OFFICIAL_PUNCTUATION = f"{_PUNCTUATION},?"
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}

# Contractions, looked up by their form without an apostrophe. The published table also has entries
# with upper-case letters, which never match because answers are lower-cased first.
_WITH_APOSTROPHE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's "
    "how'd how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've "
    "o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll "
    "someone's something'd something'll that's there'd there're there's they'd they'll they're "
    "they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's "
    "where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd "
    "you'll you're you've "
)
# Contractions with two apostrophes, and the forms with one of them that annotators write.
_DOUBLE_CONTRACTIONS = """
couldn't've: couldn'tve couldnt've
hadn't've: hadnt've hadn'tve
he'd've: hed've he'dve
it'd've: itd've it'dve
mightn't've: mightnt've mightn'tve
'ow's'at: ow's'at 'ows'at 'ow'sat
she'd've: shed've she'dve
shouldn't've: shouldnt've shouldn'tve
somebodyd: somebody'd
somebody'd've: somebodyd've somebody'dve
someone'd've: someoned've someone'dve
something'd've: somethingd've something'dve
there'd've: thered've there'dve
they'd've: theyd've they'dve
we'd've: wed've we'dve
who'd've: whod've who'dve
wouldn't've: wouldnt've wouldn'tve
y'all'll: yall'll y'allll
y'all'd've: yall'd've y'alld've y'all'dve
you'd've: youd've you'dve
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _WITH_APOSTROPHE.split()}
for _line in _DOUBLE_CONTRACTIONS.strip().splitlines():
    _contraction, _forms = _line.split(": ")
    _CONTRACTIONS |= dict.fromkeys(_forms.split(), _contraction)


@lru_cache(maxsize=1 << 16)
def normalise(answer: str) -> str:
    """Return the answer in the form that EvalAI compares: lower case, digits, no articles."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return _words(_without_punctuation(text))


def comparable(answer: str) -> str:
    """The normalised answer, or where nothing is left of it, such as of "A", its lower case."""
    return normalise(answer) or answer.strip().lower()


def normalise_official(answer: str) -> str:
    """Return the answer in the form that VQA v2's own evaluation code compares.

    It differs from `normalise` in that "'s" is not separated, and commas and question marks are
    punctuation like any other: all of it is deleted, not replaced by spaces, if a comma stands
    between two digits.
    """
    has_number = _DIGIT_COMMA.search(answer) is not None
    return _words(_without_punctuation(answer, marks=_OFFICIAL_PUNCTUATION, delete=has_number))


def _words(text: str) -> str:
    """The text's words in lower case, with digits for numbers and without articles."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str, *, marks: str = _PUNCTUATION, delete: bool = False) -> str:
    out = text
    for mark in marks:
        if mark not in text:
            continue
        # A mark next to a space is deleted; any other becomes a space.
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or delete else " ")
    return _PERIOD.sub("", out)
