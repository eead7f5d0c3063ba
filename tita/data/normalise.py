"""Answer normalisation of the VQA challenge, as EvalAI applies it before it compares answers.

The rules and tables are those of the VQA evaluation code (arXiv 1505.00468,
github.com/GT-Vision-Lab/VQA) in the form that TextVQA (arXiv 1904.08920) and LLaVA-1.5 score with.
"""

import re
from functools import lru_cache

_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}

# Words whose apostrophe annotators leave out; each stands here with it, and is looked up without.
# The published table has a few more entries that its own lower-casing keeps from ever matching.
_WITH_APOSTROPHE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's "
    "how'd how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've "
    "o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll "
    "someone's something'd something'll that's there'd there're there's they'd they'll they're "
    "they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's "
    "where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd "
    "you'll you're you've "
)
_CONTRACTIONS = {word.replace("'", ""): word for word in _WITH_APOSTROPHE.split()} | {
    "couldn'tve": "couldn't've",
    "couldnt've": "couldn't've",
    "hadnt've": "hadn't've",
    "hadn'tve": "hadn't've",
    "hed've": "he'd've",
    "he'dve": "he'd've",
    "itd've": "it'd've",
    "it'dve": "it'd've",
    "mightnt've": "mightn't've",
    "mightn'tve": "mightn't've",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "shed've": "she'd've",
    "she'dve": "she'd've",
    "shouldnt've": "shouldn't've",
    "shouldn'tve": "shouldn't've",
    "somebody'd": "somebodyd",
    "somebodyd've": "somebody'd've",
    "somebody'dve": "somebody'd've",
    "someoned've": "someone'd've",
    "someone'dve": "someone'd've",
    "somethingd've": "something'd've",
    "something'dve": "something'd've",
    "thered've": "there'd've",
    "there'dve": "there'd've",
    "theyd've": "they'd've",
    "they'dve": "they'd've",
    "wed've": "we'd've",
    "we'dve": "we'd've",
    "whod've": "who'd've",
    "who'dve": "who'd've",
    "wouldnt've": "wouldn't've",
    "wouldn'tve": "wouldn't've",
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
    "youd've": "you'd've",
    "you'dve": "you'd've",
}


@lru_cache(maxsize=1 << 16)
def normalise(answer: str) -> str:
    """The answer as EvalAI compares it: lower case, digits for words, articles dropped."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    text = _without_punctuation(text)
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    out = text
    for mark in _PUNCTUATION:
        if mark not in text:
            continue
        # Beside a space a mark goes without trace, between letters it parts two words.
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space else " ")
    return _PERIOD.sub("", out)
