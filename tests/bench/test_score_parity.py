"""Our scorers against independent implementations, on 2,000 seeded predictions for each metric.

The definitions in this file are written from the published ones and share no code with
`tita.bench`. Where published scorers differ from each other:

- VQA accuracy. VQA v2's evaluation code compares texts unchanged where the annotators are
  unanimous, and deletes all punctuation of a text with a comma between two digits; EvalAI's answer
  processor, which TextVQA, VizWiz and LLaVA-1.5 use, always normalises, separates "'s" and drops
  commas and question marks first. `vqa` follows the second, `vqa-official` the first. VLMEvalKit
  normalises always, as EvalAI does, but with the tables of the first. All of them take "The"
  for an annotator's "a"; ours is never right if nothing is left of an answer.
- Exact match. TextVQA's ST-VQA evaluator takes "The" for "A", because the processor leaves nothing
  of either. We compare such texts without it, so that an empty answer is never right.
- Relaxed accuracy. pix2struct's code parses no "1,050", compares numbers as texts if the reference
  is 0, and keeps a final period. We follow the paper: numbers within 5 % of the reference.
- ANLS. LLaVA lower-cases and strips the texts; VLMEvalKit also joins repeated spaces. We follow
  LLaVA.
- Yes and no. POPE's script takes all answers that are not a no for a yes; MME's tool looks at the
  first four characters; VLMEvalKit looks for the words "yes" and "no" anywhere. `pope` and `mme`
  follow the scripts of their suites. `yes-no` is ours: an answer that is neither is wrong.
- F1. POPE's script knows no unparsed answers. Ours are not yes, and wrong.
- MME. The tool scores the answers that it is given; VLMEvalKit multiplies the scores of the two
  questions of an image. We follow VLMEvalKit for accuracy+, so that a missing answer counts, and
  the tool for accuracy.
- Multiple choice. VLMEvalKit takes the only capital letter that is a word of its own, else the only
  option whose text is contained. `choice` reads the same option where the letter or the text is all
  that the answer says; it also knows articles, "not B" and two stated options.
- CircularEval. MMBench and VLMEvalKit stop at the first wrong rotation and count the question as
  wrong. A rotation without an answer is wrong there, too; we do the same.
- ScienceQA. LLaVA's script once guessed at random where it found no letter; now such an answer is
  wrong. We follow the latter.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.bench.test_choice_answers import ANIMALS, COLOURS, vlmevalkit
from tita.bench.chat_response import Reply
from tita.bench.evaluate import evaluate
from tita.bench.questions import BenchmarkItem
from tita.bench.results_file import answer_record
from tita.bench.scoring import METRICS, normalise_references, score_answer

NUMBER = 2_000
LETTERS = "ABCDEFGHIJ"

# Definitions

_CONTRACTIONS = """
    aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've
    couldnt've=couldn't've didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've
    hadn'tve=hadn't've hasnt=hasn't havent=haven't hed=he'd hed've=he'd've he'dve=he'd've hes=he's
    howd=how'd howll=how'll hows=how's isnt=isn't itd=it'd itd've=it'd've it'dve=it'd've itll=it'll
    maam=ma'am mightnt=mightn't mightnt've=mightn't've mightn'tve=mightn't've mightve=might've
    mustnt=mustn't mustve=must've neednt=needn't notve=not've oclock=o'clock oughtnt=oughtn't
    ow's'at='ow's'at 'ows'at='ow's'at 'ow'sat='ow's'at shant=shan't shed've=she'd've
    she'dve=she'd've shouldve=should've shouldnt=shouldn't shouldnt've=shouldn't've
    shouldn'tve=shouldn't've somebody'd=somebodyd somebodyd've=somebody'd've
    somebody'dve=somebody'd've somebodyll=somebody'll somebodys=somebody's someoned=someone'd
    someoned've=someone'd've someone'dve=someone'd've someonell=someone'll someones=someone's
    somethingd=something'd somethingd've=something'd've something'dve=something'd've
    somethingll=something'll thats=that's thered=there'd thered've=there'd've there'dve=there'd've
    therere=there're theres=there's theyd=they'd theyd've=they'd've they'dve=they'd've
    theyll=they'll theyre=they're theyve=they've twas='twas wasnt=wasn't wed've=we'd've
    we'dve=we'd've weve=we've werent=weren't whatll=what'll whatre=what're whats=what's
    whatve=what've whens=when's whered=where'd wheres=where's whereve=where've whod=who'd
    whod've=who'd've who'dve=who'd've wholl=who'll whos=who's whove=who've whyll=why'll
    whyre=why're whys=why's wont=won't wouldve=would've wouldnt=wouldn't wouldnt've=wouldn't've
    wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll y'allll=y'all'll yall'd've=y'all'd've
    y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd youd've=you'd've you'dve=you'd've
    youll=you'll youre=you're youve=you've
"""
CONTRACTIONS = dict(entry.split("=") for entry in _CONTRACTIONS.split())
DIGITS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`",
         ",", "?", "!"]  # fmt: skip


def words(text: str, *, with_digit_comma: bool) -> str:
    """Punctuation, digits, articles and contractions as VQA's `vqaEval.py` treats them."""
    comma = re.search(r"[0-9],[0-9]", text) is not None and with_digit_comma
    plain = text
    for mark in MARKS:
        alone = text.find(mark + " ") >= 0 or text.find(" " + mark) >= 0
        plain = plain.replace(mark, "" if alone or comma else " ")
    kept = []
    for place, letter in enumerate(plain):
        if letter != "." or plain[place + 1 : place + 2].isdigit():
            kept.append(letter)
    found = []
    for word in "".join(kept).lower().split():
        digit = DIGITS.get(word, word)
        if digit not in ("a", "an", "the"):
            found.append(CONTRACTIONS.get(digit, digit))
    return " ".join(found)


def evalai(text: str) -> str:
    plain = text.lower()
    for old, new in ((",", ""), ("?", ""), ("'s", " 's"), ("\n", " "), ("\t", " ")):
        plain = plain.replace(old, new)
    return words(plain.strip(), with_digit_comma=False)


def leave_one_out(answer: str, annotators: Sequence[str]) -> float:
    """Mean over the annotators of min(1, agreeing others / 3); a single reference is exact."""
    if not answer:
        return 0.0
    if len(annotators) == 1:
        return float(answer == annotators[0])
    scores = []
    for place in range(len(annotators)):
        others = [text for other, text in enumerate(annotators) if other != place]
        scores.append(min(1.0, sum(text == answer for text in others) / 3))
    return sum(scores) / len(scores)


def vqa(answer: str, references: Sequence[str]) -> float:
    return leave_one_out(evalai(answer), [evalai(text) for text in references])


def vqa_official(answer: str, references: Sequence[str]) -> float:
    lines = [t.replace("\n", " ").replace("\t", " ").strip() for t in (answer, *references)]
    if any(text != lines[1] for text in lines[1:]):
        lines = [words(text, with_digit_comma=True) for text in lines]
    return leave_one_out(lines[0], lines[1:])


def exact(answer: str, references: Sequence[str]) -> float:
    def form(text: str) -> str:
        return evalai(text) or text.strip().lower()

    return float(bool(answer.strip()) and any(form(answer) == form(text) for text in references))


def contains(answer: str, references: Sequence[str]) -> float:
    said = evalai(answer).split()
    for text in references:
        wanted = evalai(text).split()
        if not wanted and text in [word.strip(".,:;!?\"'") for word in answer.split()]:
            return 1.0
        starts = range(len(said) - len(wanted) + 1) if wanted else ()
        if any(said[n : n + len(wanted)] == wanted for n in starts):
            return 1.0
    return 0.0


def relaxed(answer: str, references: Sequence[str]) -> float:
    def number(text: str) -> float | None:
        plain = text.strip().rstrip(".").replace(",", "")
        try:
            return float(plain[:-1]) / 100 if plain.endswith("%") else float(plain)
        except ValueError:
            return None

    for text in references:
        wanted, said = number(text), number(answer)
        if wanted is None or said is None:
            if answer.strip().rstrip(".").lower() == text.strip().rstrip(".").lower():
                return 1.0
        elif 0.95 * abs(wanted) <= said * (1 if wanted >= 0 else -1) <= 1.05 * abs(wanted):
            return 1.0
    return 0.0


def anls(answer: str, references: Sequence[str]) -> float:
    def distance(one: str, other: str) -> int:
        table = {(i, 0): i for i in range(len(one) + 1)}
        table |= {(0, j): j for j in range(len(other) + 1)}
        for i in range(1, len(one) + 1):
            for j in range(1, len(other) + 1):
                replaced = table[i - 1, j - 1] + (one[i - 1] != other[j - 1])
                table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, replaced)
        return table[len(one), len(other)]

    def similarity(reference: str) -> float:
        one, other = answer.lower().strip(), reference.lower().strip()
        value = 1 - distance(one, other) / max(len(one), len(other))
        return value if value >= 0.5 else 0.0

    return max(similarity(text) for text in references)


def ocr_vqa(answer: str, references: Sequence[str]) -> float:
    return float(answer.strip().lower() in [text.strip().lower() for text in references])


def gqa(answer: str, references: Sequence[str]) -> float:
    forms = [text.strip().rstrip(".").lower() for text in (answer, *references)]
    return float(forms[0] in forms[1:])


def pope(answer: str) -> str:
    first = answer[: answer.find(".")] if "." in answer else answer
    tokens = first.replace(",", "").split(" ")
    return "no" if "No" in tokens or "not" in tokens or "no" in tokens else "yes"


def mme(answer: str) -> str:
    start = answer.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else ""


def yes_no(answer: str) -> str:
    said = re.findall(r"[a-z']+", answer.lower())
    if said[:1] in (["yes"], ["no"]):
        return str(said[0])
    sentence = ""
    for letter in answer.strip().lower():
        if letter in ".!?\n":
            break
        sentence += letter
    tokens = re.findall(r"[a-z']+", sentence)
    yes = any(t in ("yes", "yeah", "yep", "true", "correct") for t in tokens)
    no = any(
        t in ("no", "not", "nope", "false", "isn't", "aren't", "doesn't", "don't") for t in tokens
    )
    return "" if yes == no else "yes" if yes else "no"


def science_qa(answer: str, num_options: int) -> str:
    letter = ""
    if answer in list("ABCDE") or (answer[:1] in list("ABCDE") and answer[1:3] == ". "):
        letter = answer[0]
    else:
        stated = re.findall("The answer is ([A-Z]).", answer)
        letter = stated[0] if len(stated) == 1 else ""
    return letter if letter in LETTERS[:num_options] else ""


# Predictions


@dataclass(frozen=True, kw_only=True)
class Prediction:
    answer: str
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()
    meant: int | None = None
    """The option that the answer was made to state."""


_WORDS = (
    "red Two the coca-cola 1,000 3.5 No. dont it's a (left) black/white yes? 10 ten none U.S. an "
    "shouldn'tve t-shirt! 1,000-2 50% don't hed've stop  sign 7:30 p.m. x@y.z ten, it`s [1] A/B "
    "two; =5 1.5. _a_ \n somebody'd none. hello,world 3,5? What's"
)
WORDS = tuple(_WORDS.split(" "))
CONTRACTED = tuple(CONTRACTIONS)
NUMBERS = ("100", "95", "105", "94.9", "1,050", "-100", "-95.0", "0", "0.0", "52%", "0.5", "0.52",
           "1e2", "Paris", "paris.", "100.", " 104 ", "5 apples", "", "3%")  # fmt: skip
YES_NO = ("Yes", "No", "yes.", "no, it is not", "There is a dog", "It is not there.", "True",
          "I see. No", "Sure. Not really", "Yes and no", "isn't", "not", "No way! yes", "nope", "",
          "Noted.", "yesterday", "It could be yes or no", "It's correct", "\nno", "Know",
          "false")  # fmt: skip


def text(rng: random.Random) -> str:
    parts = rng.choices(WORDS, k=rng.randint(1, 3))
    if rng.random() < 0.2:
        parts.append(rng.choice(CONTRACTED))
    return " ".join(parts)


def disturbed(rng: random.Random, given: str) -> str:
    """A text with another case, article, punctuation, space, number word or letter."""
    changes: tuple[Callable[[str], str], ...] = (
        str.upper, str.lower, lambda t: f"The {t}", lambda t: f"{t}.", lambda t: f" {t}\n",
        lambda t: t.replace("10", "ten"), lambda t: t.replace("-", " "), lambda t: t[:-1],
        lambda t: f"{t} now", lambda t: t.replace("'", ""), lambda t: t,
    )  # fmt: skip
    return rng.choice(changes)(given)


def text_prediction(rng: random.Random, *, annotators: bool) -> Prediction:
    # Empty references are annotators' only; other metrics drop them.
    wanted = [text(rng).strip() or "red" for _ in range(rng.randint(1, 3))]
    if annotators:
        unanimous = rng.random() < 0.3
        wanted = [wanted[0]] * 10 if unanimous else rng.choices([*wanted, "", "a"], k=10)
    answer = disturbed(rng, rng.choice(wanted)) if rng.random() < 0.8 else text(rng)
    return Prediction(answer=answer, references=tuple(wanted))


def number_prediction(rng: random.Random) -> Prediction:
    wanted = rng.choice([number for number in NUMBERS if number])
    return Prediction(answer=rng.choice([wanted, *NUMBERS]), references=(wanted,))


def yes_no_prediction(rng: random.Random) -> Prediction:
    return Prediction(answer=rng.choice(YES_NO), references=(rng.choice(("yes", "no")),))


# {L}, {t}: letter and text of the meant option; {M}, {u}: those of another one. VLMEvalKit's rule
# reads the forms of the first group alike. None is stated in the third.
ALIKE = ("{L}", "{L}.", "({L})", "{L}: {t}", "({L}) {t}.", "{t}", "{t}.", "Answer: {L}",
         "The answer is {L}.", "I would choose {L}.", "The correct option is {L}")  # fmt: skip
OURS = ("The answer is {L}, not {M}.", "It is not {M}; it is {L}.", "{M} is wrong. {L} is right.",
        "\\boxed{{{L}}}", "**{L}**", "{l}", "option {l}")  # fmt: skip
UNREAD = ("The answer is {L} or {M}.", "I cannot tell.", "", "Z", "not {M}")


def choice_prediction(rng: random.Random) -> Prediction:
    choices = rng.choice([ANIMALS, COLOURS, ("1", "2", "3"), ("in the street", "at the sea")])
    meant, other = rng.sample(range(len(choices)), 2)
    forms = rng.choices((ALIKE, OURS, UNREAD), weights=(6, 3, 1))[0]
    answer = rng.choice(forms).format(
        L=LETTERS[meant], l=LETTERS[meant].lower(), t=choices[meant], M=LETTERS[other],
    )  # fmt: skip
    if forms is ALIKE and "dog" not in answer:  # which stands in "hot dog", too
        assert vlmevalkit(answer, choices) == meant, answer
    right = meant if rng.random() < 0.6 else rng.randrange(len(choices))
    return Prediction(
        answer=answer,
        references=(LETTERS[right],),
        choices=choices,
        meant=None if forms is UNREAD else meant,
    )


def science_qa_prediction(rng: random.Random) -> Prediction:
    letter = rng.choice("ABCDEF")
    forms = ("{L}", "{L}. x", "The answer is {L}.", "The answer is {L}. The answer is B.", "({L})",
             "{L}.", "So: The answer is {L}, I think", "The answer is {L}")  # fmt: skip
    return Prediction(
        answer=rng.choice(forms).format(L=letter),
        references=(rng.choice([letter if letter in "ABC" else "B", "A"]),),
        choices=("x", "y", "z"),
    )


def predictions(metric: str) -> list[Prediction]:
    rng = random.Random(f"{metric} 1")
    makers: dict[str, Callable[[random.Random], Prediction]] = {
        "relaxed": number_prediction,
        "science-qa": science_qa_prediction,
        **dict.fromkeys(("yes-no", "pope", "mme"), yes_no_prediction),
        **dict.fromkeys(("choice", "circular"), choice_prediction),
    }
    annotators = metric.startswith("vqa")
    make = makers.get(metric, lambda rng: text_prediction(rng, annotators=annotators))
    return [make(rng) for _ in range(NUMBER)]


def published(metric: str, given: Prediction) -> float:
    texts = {
        "exact": exact, "contains": contains, "relaxed": relaxed, "anls": anls, "vqa": vqa,
        "vqa-official": vqa_official, "ocr-vqa": ocr_vqa, "gqa": gqa,
        "real-world-qa": gqa,
    }  # fmt: skip
    if metric in texts:
        return texts[metric](given.answer, given.references)
    if metric in ("choice", "circular"):
        return float(given.meant is not None and LETTERS[given.meant] == given.references[0])
    if metric == "science-qa":
        said = science_qa(given.answer, len(given.choices))
    else:
        said = {"yes-no": yes_no, "pope": pope, "mme": mme}[metric](given.answer)
    return float(said == given.references[0])


def ours(metric: str, given: Prediction) -> float:
    references = normalise_references(metric, given.references, choices=given.choices, where="here")
    scored = score_answer(metric, given.answer, references=references, choices=given.choices)
    assert scored is not None
    return scored.score


# tests/suites/test_choice_sets.py compares mmmu-open with another implementation.
@pytest.mark.parametrize("metric", [name for name in METRICS if name != "mmmu-open"])
def test_every_score_equals_that_of_the_published_definition(metric: str) -> None:
    given = predictions(metric)
    expected = [published(metric, each) for each in given]
    differ = [
        (each, wanted, got)
        for each, wanted in zip(given, expected, strict=True)
        if (got := ours(metric, each)) != pytest.approx(wanted)
    ]
    assert differ == []
    # Predictions that are all right or all wrong would prove nothing.
    assert 0.15 < sum(expected) / NUMBER < 0.85


# Totals


def percentages(metric: str, rows: Sequence[tuple[Prediction, bool, str]], folder: Path) -> Any:
    """The values of `tita-bench eval` for (prediction, has an answer, group)."""
    fields = {"model_name": "m", "weight": None, "questions_sha256": "d"}
    with (folder / "results.jsonl").open("w") as file:
        for number, (given, answered, group) in enumerate(rows):
            item = BenchmarkItem(
                id=str(number), text="Which?", references=given.references, choices=given.choices,
                metric=metric, group=group,
            )  # fmt: skip
            reply = Reply(text=given.answer, response_time_s=0.1) if answered else None
            error = "" if answered else "x"
            record = answer_record(item, reply, error=error, attempts=1, run=fields)
            file.write(json.dumps(record) + "\n")
    return evaluate(folder).report["runs"][0]["scores"][0]["values"]


@pytest.mark.parametrize("metric", ["yes-no", "pope"])
def test_f1_and_yes_ratio_equal_those_of_the_confusion_matrix(metric: str, tmp_path: Path) -> None:
    rng = random.Random(f"{metric} 2")
    rows = [(each, rng.random() > 0.1, "") for each in predictions(metric)]
    values = percentages(metric, rows, tmp_path)
    read = {"yes-no": yes_no, "pope": pope}[metric]
    said = [(read(each.answer), each.references[0]) for each, answered, _ in rows if answered]
    hits, alarms = said.count(("yes", "yes")), said.count(("yes", "no"))
    misses = sum(label == "yes" for _, label in said) - hits
    assert values == pytest.approx(
        {
            "score": 100 * (hits + said.count(("no", "no"))) / len(said),
            "accuracy": 100 * (hits + said.count(("no", "no"))) / len(said),
            "precision": 100 * hits / (hits + alarms),
            "recall": 100 * hits / (hits + misses),
            "f1": 100 * 2 * hits / (2 * hits + alarms + misses),
            "yes_ratio": 100 * (hits + alarms) / len(said),
            "unparsed": sum(word == "" for word, _ in said),
        }
    )
    assert values["unparsed"] > 0 or metric == "pope"


def test_mme_equals_the_sum_over_questions_and_over_images(tmp_path: Path) -> None:
    rng = random.Random("mme 2")
    rows = [(e, rng.random() > 0.1, f"{n // 2}.png") for n, e in enumerate(predictions("mme"))]
    values = percentages("mme", rows, tmp_path)
    answered = [published("mme", each) for each, is_answered, _ in rows if is_answered]
    both = sum(
        all(is_answered and published("mme", each) for each, is_answered, _ in rows[n : n + 2])
        for n in range(0, NUMBER, 2)
    )
    assert values["accuracy"] == pytest.approx(100 * sum(answered) / len(answered))
    assert values["accuracy_plus"] == pytest.approx(100 * both / (NUMBER / 2))
    assert values["groups"] == NUMBER / 2


def test_circular_accuracy_equals_that_of_a_loop_over_rotations(tmp_path: Path) -> None:
    rng = random.Random("circular 2")
    asked = [each for each in predictions("circular") if len(each.choices) == 2]
    while len(asked) < NUMBER:
        asked += asked[: NUMBER - len(asked)]
    rows = [(each, rng.random() > 0.05, f"q{n // 2}") for n, each in enumerate(asked)]
    values = percentages("circular", rows, tmp_path)
    num_right = 0
    for n in range(0, NUMBER, 2):
        for given, is_answered, _ in rows[n : n + 2]:
            if not is_answered or not published("circular", given):
                break
        else:
            num_right += 1
    answered = [published("circular", given) for given, is_answered, _ in rows if is_answered]
    assert values["score"] == pytest.approx(100 * num_right / (NUMBER / 2))
    assert values["vanilla"] == pytest.approx(100 * sum(answered) / len(answered))
    assert 0 < num_right < NUMBER / 2


# Hand-worked values

TEN = ("grey",) * 6 + ("gray",) * 3 + ("Silver.",)
HAND = [
    # Three of ten: leaving out one of the three leaves 2/3, seven times 1: (3 x 2/3 + 7) / 10.
    ("vqa", "Gray", TEN, 0.9),
    ("vqa-official", "Gray", TEN, 0.9),
    # One of ten: 0 once, 1/3 nine times.
    ("vqa", "silver", TEN, 0.3),
    ("vqa", "Yes", ("yes",) * 10, 1.0),
    ("vqa-official", "Yes", ("yes",) * 10, 0.0),
    ("vqa", "1000-2", ("1,000-2",) * 5 + ("x",) * 5, 1.0),
    ("vqa-official", "10002", ("1,000-2",) * 5 + ("x",) * 5, 1.0),
    ("vqa", "10002", ("1,000-2",) * 5 + ("x",) * 5, 0.0),
    ("exact", "Two dogs!", ("2 dogs",), 1.0),
    ("exact", "The", ("A",), 0.0),
    ("contains", "It is a stop sign.", ("the stop sign",), 1.0),
    ("contains", "nonstop signs", ("stop sign",), 0.0),
    ("relaxed", "1,050", ("1000",), 1.0),
    ("relaxed", "1,051", ("1000",), 0.0),
    # One of six characters is wrong: 1 - 1/6.
    ("anls", "Potato", ("tomato", "pototo"), 5 / 6),
    # Four of seven: below 0.5.
    ("anls", "kitchen", ("cabinet",), 0.0),
    ("ocr-vqa", "Stephen King", ("stephen king",), 1.0),
    ("gqa", "Left.", ("left",), 1.0),
    ("gqa", "the left", ("left",), 0.0),
    ("pope", "I cannot tell", ("yes",), 1.0),
    ("yes-no", "I cannot tell", ("yes",), 0.0),
    ("mme", "I say yes", ("yes",), 0.0),
]


@pytest.mark.parametrize(("metric", "answer", "references", "score"), HAND)
def test_hand_worked_values(
    metric: str, answer: str, references: tuple[str, ...], score: float
) -> None:
    given = Prediction(answer=answer, references=references)
    assert ours(metric, given) == pytest.approx(score)
    assert published(metric, given) == pytest.approx(score), "the independent one, too"
