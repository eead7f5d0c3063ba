"""Reads which option of a multiple-choice question an answer names.

The rules extend the exact matching of MMBench (arXiv 2307.06281) as VLMEvalKit implements it: an
option letter that is a word of its own, else the text of an option. Each mention of an option gets
a rank from its sentence, so that an article, a label or a rejected option is not taken for the
answer. An answer with several candidates of the same rank is unparsed, never guessed.
"""

import itertools
import re
import string
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

LETTERS = string.ascii_uppercase
"""Letters of options, in order."""

_MASK = "\x00"
_MIN_TEXT_LIMIT = 40
_CONTEXT_CHARS = 200
_MAX_MENTIONS = 64

_MARKED = re.compile(
    r"\\boxed\s*\{\s*(?:\\text\s*\{)?([^{}]*)\}*|<answer>\s*(.*?)\s*</answer>", re.S | re.I
)
_MARKUP = re.compile(r"[*`$_~\\]+")
_SENTENCE = re.compile(r"[^.!?;\n。！？；]*[.!?;\n。！？；]*")
_INNER_PERIOD = re.compile(r"(?<=[A-Za-z0-9])\.(?=[A-Za-z0-9])")

# A letter that is a word: no part of a word, of an abbreviation (U.S.), a name (B-52) or C++.
_LETTER = re.compile(
    r"(?<![A-Za-z0-9'&@#+])(?<![A-Za-z0-9][-.])([A-Za-z])"
    r"(?![A-Za-z0-9'&@#+%])(?!-[A-Za-z0-9])(?!\.[A-Za-z](?![A-Za-z]))"
)
_OPENING, _CLOSING = r"[\s\"'(\[{<:]*", r"[\s\"')\]}>.,:]*"
_JOINED = re.compile(r"[\s\"')\],]*(?:\band\b|\bor\b|[&/,])[\s\"'(\[]*")
_YEAR = re.compile(r"\)\s*\d{4}")

_NOUN = r"(?:answers?|options?|choices?|letters?|selection|response|solution|pick|guess|conclusion)"
_QUALIFIER = (
    r"(?:(?:the|an?|my|definitely|clearly|probably|likely|most|certainly|obviously|therefore|thus|"
    r"indeed|best|correct|right|final|only|either|option|answer|choice|letter|to|be|just)\s+)*"
)
_IS = r"(?:is|are|was|be|being|as|:|=|->|→|would\s+be|must\s+be|should\s+be|has\s+to\s+be)"
# What stands before a letter that the answer states.
_STATED_BEFORE = re.compile(
    rf"(?:\b{_NOUN}\b[^.!?;\n]*?(?:\b|\s){_IS}|\b(?:answer|response|solution)\b\s*[-:=]*|"
    r"\b(?:choos(?:e|ing)|chose|select(?:ed|ing)?|pick(?:ed|ing)?|go(?:ing)?\s+(?:with|for)|"
    r"vote\s+for|opt(?:ing)?\s+for|conclude|one\s+is)|"
    r"\b(?:it|this|that)(?:'s|\s+is|\s+(?:must|should|would|has\s+to)\s+be)|"
    r"答案|选择|選擇|选|應該是|应该是|正确的是)"
    rf"[\s:：是为]*{_QUALIFIER}{_OPENING}$",
    re.I,
)  # fmt: skip
_STATED_AFTER = re.compile(
    rf"^{_CLOSING}(?:is|seems|looks|appears|would\s+be|must\s+be|should\s+be)\s+(?:to\s+be\s+)?"
    rf"{_QUALIFIER}(?:correct|right|best|answer|true|accurate|appropriate|suitable|option|choice)\b",
    re.I,
)
# What stands before a letter that is mentioned: an option's label, a verb, punctuation.
_MENTIONED_BEFORE = re.compile(
    rf"(?:^|[\"'(\[{{<>,:;=—–→/&\-]|[^\x00-\x7f]|\b(?:{_NOUN}|is|be|was|as|with|to|for|say|think|believe|"
    r"guess|choose|pick|select|probably|likely|definitely|clearly|certainly|perhaps|maybe|so|thus|"
    r"hence|therefore|because|than|not|or|and|but|only|either|both|neither|nor|statement|"
    r"description|caption|suggests?|indicates?|points?\s+to|matches))\s*$",
    re.I,
)
_DENIED_BEFORE = re.compile(
    r"(?:(?:\b|can)not|n't|\bnever|\bneither|\bnor|\bexcept(?:\s+for)?|\brather\s+than|"
    r"\binstead\s+of|\brul(?:e|es|ed|ing)\s+out|\beliminat\w+|\bexclud\w+|\bunlike|\bthan|"
    r"\bwithout|\bno|\breject\w*|\bdiscard\w*|\bdismiss\w*|不是|不选|并非)[\s\"'(\[]*"
    r"(?:(?:(?:the|an?|be|being|either|options?|answer|choice|letter|necessarily|both|any|of|have|or|"
    r"and|nor|correct|right)\s+|(?<![\w'])[A-Z](?![\w'])[\s\"')\],/&]*)[\"'(\[]*)*$",
    re.I,
)  # fmt: skip
_DENIED_AFTER = re.compile(
    r"^[\s\"')\],]*(?:(?:,|/|&|\band\b|\bor\b)\s*(?:option\s+|also\s+)*[\"'(\[]*[A-Z][\"')\],]*\s*)*"
    r"(?:(?:is|are|was|were|can|could|do|does|did|has|have|would|seems?|looks?|may)\s*"
    r"(?:be\s+|both\s+|all\s+|clearly\s+|also\s+|simply\s+|definitely\s+)*(?:not\b|n't)?\s*)?"
    r"(?:(?<=not)|(?<=not\s)|(?<=n't)|(?<=n't\s)|incorrect|wrong|false|ruled|eliminated|excluded|"
    r"unlikely|inaccurate|impossible|irrelevant|absent|rejected|out\b)",
    re.I,
)
_HYPOTHETICAL = re.compile(
    r"\b(?:if|whether|initially|originally|at\s+first|first\s+thought|unless|suppose)\b", re.I
)
_FINAL = re.compile(
    r"\b(?:final(?:ly)?|therefore|thus|hence|in\s+conclusion|overall|to\s+conclude)\b", re.I
)
_REASON = re.compile(r"\b(?:because|since|as|while|whereas|although|though|given)\b", re.I)
_UNDECIDED = re.compile(
    r"\b(?:can(?:not|'t)|unable\s+to|impossible\s+to|not\s+possible\s+to|hard\s+to)\s+(?:be\s+)?"
    r"(?:determine|tell|say|answer|see|decide|identif|choose)|\bnot\s+sure\b|"
    r"\bnone\s+of\s+(?:the|these|them)\b|\bno\s+(?:correct|right|valid)\s+(?:answer|option)\b|"
    r"\bany\s+of\s+(?:the|these|them)\b",
    re.I,
)  # fmt: skip
_CORRECTION = re.compile(
    r"\b(?:wait|actually|correction|i\s+mean|on\s+second\s+thought|scratch\s+that|sorry|hmm)\b",
    re.I,
)
# A letter before another word is an article, a pronoun or a label ("B major").
_CONTINUES = re.compile(
    r"^\s+(?:is|was|are|because|since|as|and|or|but|would|could|should|must|might|seems?|looks|appears|"
    r"matches|best|most|shows|depicts|describes|has|for|if|not|isn't|rather|instead|over|due|given|"
    r"based|while|whereas|which|cannot|can|can't|does|doesn't|fits|makes|in|on|from|among|here|this|"
    r"that|the|it|it's|to|with|by|so|then|also|both|will)\b"
)
_INITIALS = re.compile(r"(?<![A-Za-z])(?:[A-Z]\.\s?){2,}\s*[A-Z][a-z]")
_LABEL_BEFORE = re.compile(rf"\b{_NOUN}\s+$", re.I)
# Texts of options that are too common to be found inside of an answer.
_COMMON = frozenset(
    ("an", "the", "it", "is", "of", "in", "on", "to", "at", "no", "not", "none", "yes", "one", "or",
     "and", "up", "by")
)  # fmt: skip


class _Rank(IntEnum):
    """How strongly a mention claims to be the answer."""

    DENIED = 0
    MENTIONED = 1
    STATED = 2
    FINAL = 3


@dataclass(slots=True)
class _Mention:
    """One mention of an option: its index and its place in the text."""

    index: int
    start: int
    end: int
    sentence: int
    rank: _Rank = _Rank.MENTIONED
    denied: bool = False


def parse_choice(answer: str, choices: Sequence[str]) -> int | None:
    """Index of the option that the answer names by its letter or by its text, or None.

    A stated letter ("The answer is B", "(B) ...", "B is correct") outranks mentioned ones; rejected
    options ("not B", "B is wrong") and articles do not count. Without a letter it is the only
    option whose text the answer contains as whole words.
    """
    text = _plain(answer)
    whole = _bare(text)
    if len(whole) == 1 and whole.upper() in LETTERS[: len(choices)]:
        return LETTERS.index(whole.upper())
    same = [index for index, choice in enumerate(choices) if whole and _bare(choice) == whole]
    if same:
        return same[0] if len(same) == 1 else None
    sentences = _sentences(text)
    masked, named = _find_texts(text, choices, sentences)
    mentions = _find_letters(masked, len(choices), sentences)
    letter, is_tie = _decide(mentions, masked, sentences)
    if is_tie:
        return None
    text_rank = max((m.rank for m in named if not m.denied), default=None)
    by_text = {m.index for m in named if not m.denied and m.rank == text_rank}
    if letter is not None and letter.rank >= _Rank.STATED:
        return None if _contradicts(letter, masked, named) else letter.index
    if letter is not None:
        undecided = _UNDECIDED.search(masked)
        return None if undecided or by_text - {letter.index} else letter.index
    if len(by_text) != 1 or _UNDECIDED.search(masked):
        return None
    # In a long answer the only option that occurs is often not what it is about.
    limit = max(_MIN_TEXT_LIMIT, 2 * sum(map(len, choices)))
    if text_rank == _Rank.MENTIONED and len(text) > limit:
        return None
    return by_text.pop()


def _plain(answer: str) -> str:
    """The answer without markup and typographic variants."""
    text = unicodedata.normalize("NFKC", answer).replace("\u2019", "'").replace("\u2018", "'")
    text = text.replace("\u201c", '"').replace("\u201d", '"')
    text = _MARKED.sub(lambda found: f"\nFinal answer: {found[1] or found[2] or ''}.\n", text)
    return _MARKUP.sub("", text).strip()


def _bare(text: str) -> str:
    """The text without case, outer punctuation and repeated spaces."""
    return " ".join(text.lower().strip(" \t\n.,:;!?\"'()[]{}<>*").split())


def _sentences(text: str) -> list[tuple[int, int]]:
    joined = _INNER_PERIOD.sub(_MASK, text)
    return [found.span() for found in _SENTENCE.finditer(joined) if found[0]]


def _sentence_at(position: int, sentences: Sequence[tuple[int, int]]) -> int:
    return bisect_right(sentences, position, key=lambda span: span[0]) - 1


def _context(text: str, hit: tuple[int, int], sentence: tuple[int, int]) -> tuple[str, str]:
    """What stands before and after a mention in its sentence, cut to what the rules need."""
    before, after = text[sentence[0] : hit[0]], text[hit[1] : sentence[1]]
    if len(before) > _CONTEXT_CHARS:
        before = f"~ {before[-_CONTEXT_CHARS:]}"  # not the start of the sentence
    return before, after[:_CONTEXT_CHARS]


def _find_texts(
    text: str, choices: Sequence[str], sentences: Sequence[tuple[int, int]]
) -> tuple[str, list[_Mention]]:
    """Options named by their text, longest first; returns the text with them masked."""
    found: list[_Mention] = []
    masked = text
    order = sorted(range(len(choices)), key=lambda index: -len(choices[index]))
    for index in order:
        words = _bare(_MARKUP.sub("", unicodedata.normalize("NFKC", choices[index])))
        if (len(words) < 2 and not words.isdigit()) or words in _COMMON:
            continue
        pattern = r"\s+".join(map(re.escape, words.split()))
        before = r"(?<![\w.,\-])" if words[0].isdigit() else r"(?<!\w)"
        after = r"(?![\w%]|[.,:/]\d)" if words[-1].isdigit() else r"(?:e?s)?(?!\w)"
        for hit in re.finditer(before + pattern + after, masked, re.I):
            found.append(_Mention(index, *hit.span(), _sentence_at(hit.start(), sentences)))
            masked = masked[: hit.start()] + _MASK * len(hit[0]) + masked[hit.end() :]
    for mention in found:
        _rank(mention, *_context(masked, (mention.start, mention.end), sentences[mention.sentence]))
    return masked, found


def _find_letters(
    text: str, num_options: int, sentences: Sequence[tuple[int, int]]
) -> list[_Mention]:
    names = [found.span() for found in _INITIALS.finditer(text)]
    hits = [
        hit
        for hit in _LETTER.finditer(text)
        if hit[1].upper() in LETTERS[:num_options]
        and not any(start <= hit.start() < end for start, end in names)
    ]
    mentions: list[_Mention] = []
    following = None  # the next option letter after this one
    for hit in reversed(hits):
        number = _sentence_at(hit.start(), sentences)
        before, after = _context(text, hit.span(), sentences[number])
        is_joined = (
            following is not None
            and hit[1].isupper()
            and _JOINED.fullmatch(text, hit.end(), following.start) is not None
        )
        if not (is_joined or _is_option(hit[1], before, after)):
            continue
        mention = _Mention(LETTERS.index(hit[1].upper()), *hit.span(), number)
        _rank(mention, before, after)
        if not mention.denied and _stands_alone(text, mention, before, after):
            mention.rank = max(mention.rank, _Rank.STATED)
        sentence = text[slice(*sentences[number])]
        if sentence.rstrip().endswith(("?", "？")) or _HYPOTHETICAL.search(before):
            mention.denied = True
        mentions.append(mention)
        following = mention
    return _without_lists(mentions[::-1], text)


def _stands_alone(text: str, mention: _Mention, before: str, after: str) -> bool:
    """Whether the letter is a sentence of its own, or labels the whole answer ("B. a dog")."""
    if not before.strip(" \n\"'([{<:-") and not after.strip(" \n\"')]}>.,:;!-"):
        return True
    is_first = not text[: mention.start].strip(" \n\"'([{<:-")
    rest = text[mention.end :] or "\n"
    return is_first and bool(re.match(r"\s*[)\]}>.:,\-–—]|\s*\n", rest))


def _is_option(letter: str, before: str, after: str) -> bool:
    """Whether a single letter can be an option at this place."""
    if _YEAR.match(after):
        return False  # "(C) 2019", a copyright
    is_enclosed = bool(re.search(r"[\"'(\[{<]$", before)) and bool(re.match(r"[\"')\]}>]", after))
    is_followed_by_word = bool(re.match(r"\s+[\w'\x00]", after))
    if letter.islower():
        # Also a word or a variable: only at the end of a statement, or in parentheses.
        stated = _STATED_BEFORE.search(before) or _LABEL_BEFORE.search(before)
        is_first = not before.strip()
        labelled = is_first and bool(re.match(r"[).:]", after))
        return is_enclosed or labelled or (bool(stated) and not is_followed_by_word)
    if is_enclosed or _LABEL_BEFORE.search(before):
        return True
    stated_before = bool(_STATED_BEFORE.search(before))
    if is_followed_by_word:
        may_be_word = letter in "AI" or not stated_before
        if letter == "I" or (may_be_word and not _CONTINUES.match(after)):
            return False
    return stated_before or bool(_STATED_AFTER.match(after) or _MENTIONED_BEFORE.search(before))


def _rank(mention: _Mention, before: str, after: str) -> None:
    """Rank a mention by the words before and after it in its sentence."""
    if _DENIED_BEFORE.search(before) or _DENIED_AFTER.match(after):
        mention.denied = True
    elif _STATED_BEFORE.search(before) or _STATED_AFTER.match(after):
        mention.rank = _Rank.FINAL if _FINAL.search(before) else _Rank.STATED


def _without_lists(mentions: list[_Mention], text: str) -> list[_Mention]:
    """The mentions except the labels of a list that repeats the options, one per line."""
    labels = [
        m
        for m in mentions
        if not text[: m.start].rpartition("\n")[2].strip(" \"'([{<-")
        and re.match(r"[)\].:]", text[m.end :])
    ]
    if len({m.index for m in labels}) < 2:
        return mentions
    return [m for m in mentions if m not in labels]


def _decide(
    mentions: Sequence[_Mention], text: str, sentences: Sequence[tuple[int, int]]
) -> tuple[_Mention | None, bool]:
    """The letter that is the answer, if any; and whether several letters claim to be it."""
    alive = [m for m in mentions if not m.denied]
    if not alive:
        return None, False
    if len(alive) > _MAX_MENTIONS:
        return None, True
    for one, other in itertools.permutations(alive, 2):
        if other.sentence != one.sentence or one.rank <= other.rank:
            continue
        # "The answer is B, if not C" states both, "B or C is right" too; "B, because C ..." and
        # "C is tempting, but the answer is B" state one.
        gap = text[min(one.end, other.end) : max(one.start, other.start)]
        is_joined = _JOINED.fullmatch(gap) is not None
        if is_joined or (other.start > one.start and not _REASON.search(gap)):
            other.rank = one.rank
    if _CORRECTION.search(text) and len({m.index for m in alive}) > 1:
        return None, True
    best = max(m.rank for m in alive)
    candidates = {m.index for m in alive if m.rank == best}
    if best == _Rank.MENTIONED and candidates & {m.index for m in mentions if m.denied}:
        return None, True
    first = next(m for m in alive if m.rank == best)
    return (first, False) if len(candidates) == 1 else (None, True)


def _contradicts(letter: _Mention, masked: str, named: Sequence[_Mention]) -> bool:
    """Whether the letter is followed by another option's text and nothing else: "B. red"."""
    rest = masked[letter.end :]
    if rest.strip(f"{_MASK} \n\"')]}}>.,:;!-"):
        return False
    after = {m.index for m in named if m.start >= letter.end}
    return bool(after) and letter.index not in after
