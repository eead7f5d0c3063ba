"""Which option an answer names: hand-worked chatty answers with traps, and synthetic ones."""

import random
import re
from collections import Counter
from collections.abc import Sequence

import pytest

from tita.bench.choice_answers import LETTERS, parse_choice

ANIMALS = ("cat", "dog", "bird", "hot dog")
COLOURS = ("red", "blue", "green", "black")

# What a person reads, or "-" where a person would ask again.
READ_ANIMALS = r"""
B :: B
C :: (C)
C :: [C]
C :: c
B :: b.
B :: "B"
B :: **B**
B :: B: the cat
B :: **B.** dog
B :: B.dog
B :: B) dog
B :: (b) dog
- :: B. cat
- :: E
A :: Answer: A
B :: ANSWER - B
A :: The answer is A, not B.
A :: Based on the image, the best answer is A.
D :: I think that the answer must be D
B :: It is the dog.
D :: a hot dog
B :: the answer is a dog
A :: the answer is a
B :: A man is walking a dog
A :: A cat sits on the mat, so I would say it
- :: A dog or the bird might well be in here somewhere
B :: It's not A, it's B.
B :: It is not A, it is B.
D :: A, B and C are wrong; it is D.
D :: A, B and C are wrong, so the answer is D.
- :: The answer is A or B.
- :: A or B
- :: A/B
- :: B or not B
- :: Both A and B are correct
- :: The answer is A. Wait, actually it's B.
B :: No, the answer is B.
C :: \boxed{C}
D :: The final answer is $\boxed{\text{D}}$.
B :: <answer>B</answer>
B :: 答案是B。
B :: 选B
B :: 不是A，是B
- :: Vitamin C
- :: (C) 2019 Getty Images
- :: B-52
- :: The U.S.A. flag
- :: exit B
- :: J. D. Salinger
B :: I see a dog.
B :: Option A shows a cat sleeping. Option B shows a dog. Therefore, the answer is B.
C :: A: a cat\nB: a dog\nC: a bird\nThe answer is C.
- :: A. cat\nB. dog\nC. bird\nD. hot dog
B :: B because the animal barks
B :: B is correct
- :: B is incorrect.
B :: Only B is correct; A is not.
B :: The correct choice is (b).
- :: I cannot determine the answer from the image.
- :: None of the above
C :: There is no dog, only a bird.
- :: not a cat
B :: It isn't a cat but a dog
C :: The answer is not A but C
C :: Is it B? No, it is C.
C :: If the answer were A, we'd see fur; it is C.
B :: B\n\nExplanation: the picture shows A and C nowhere.
B :: B. The dog is next to a cat.
D :: Sure! The answer is:\n\nD
C :: I would go with C
- :: category
B :: dogs
B :: The answer is B rather than A
C :: Neither A nor B; C
- :: rule out A and B, leaving C and D
B :: We can rule out A, so B
C :: I choose option C because option A is blurry.
B :: The answer is B, while C is a bird
D :: My answer would be the hot dog
D :: option d
C :: The best match is C: bird
- :: This picture was taken at gate C of the airport.
- :: The person A stands left of person B
A :: I'm going with A as it's the cat.
A :: It's A
"""

READ_COLOURS = r"""
- :: The car, parked next to a red building, is purple and has four doors on it.
A :: The color of the car is red.
C :: It appears to be green
B :: The coat of the man with an umbrella is not black but blue, so the final answer is blue.
A :: A red car
B :: A blue car
C :: A green
C :: C. Green is the colour of the car in the middle of the image, next to a red and a black one.
C :: Option A is incorrect because it's blurry. Option B is incorrect. Option C is correct.
D :: Options A and B are wrong. The answer must be D.
- :: It could be A or C
C :: I was going to say A but the answer is C.
B :: A and C are both plausible, however B is correct.
- :: Not B.
D :: Definitely not B; D
- :: The image doesn't show B.
- :: There's no A in the picture.
- :: D.C. is the capital
- :: C major
- :: Type B blood
- :: At point B the speed is highest
B :: B, the blue one
B :: Blue (B)
- :: Blue or red
C :: Neither red nor blue; it is green.
B :: I'm not sure, but I think it's B.
- :: Unable to determine
B :: A is tempting, but the right answer is B.
B :: The answer isn't A. The answer is B.
- :: All except B are wrong
- :: Everything but C is wrong.
D :: Answer is (D) black.
- :: AB
- :: A, B, C, D
C :: => C
D :: Explanation: The image shows a person A and a person B. Answer: D
A :: a) red
A :: The best choice here would be A
A :: A best describes the picture
B :: A is a good try, but B is the answer
- :: Grade A
- :: The object is 5 m from B.
C :: I think B is wrong, C is right.
C :: B is not the right answer, C is.
- :: It is not red.
C :: Red is wrong. The answer is green.
A :: The answer is A because B, C and D are not visible.
C :: The answer is C. (Not A or B.)
"""


def cases(table: str, choices: Sequence[str]) -> list[tuple[str, str, Sequence[str]]]:
    lines = (line.split(" :: ", maxsplit=1) for line in table.strip().splitlines())
    return [(answer.replace("\\n", "\n"), letter, choices) for letter, answer in lines]


@pytest.mark.parametrize(
    ("answer", "letter", "choices"), cases(READ_ANIMALS, ANIMALS) + cases(READ_COLOURS, COLOURS)
)
def test_an_answer_is_read_as_a_person_reads_it(
    answer: str, letter: str, choices: Sequence[str]
) -> None:
    index = parse_choice(answer, choices)
    assert ("-" if index is None else LETTERS[index]) == letter


def test_options_may_be_numbers_letters_of_words_or_long_texts() -> None:
    assert parse_choice("There are 3.", ["1", "2", "3", "13"]) == 2
    assert parse_choice("13", ["1", "2", "3", "13"]) == 3
    assert parse_choice("It costs 1.50", ["1", "50", "1.5", "2"]) is None
    assert parse_choice("no", ["yes", "no"]) == 1
    assert parse_choice("There is no one here", ["yes", "no", "one"]) is None
    assert parse_choice("Both A and B", ["cat", "dog", "Both A and B", "none"]) == 2
    assert parse_choice("vitamin c", ["Vitamin A", "Vitamin B", "Vitamin C"]) == 2
    assert parse_choice("It has Vitamin C.", ["Vitamin A", "Vitamin B", "Vitamin C"]) == 2
    assert parse_choice("J", list(map(str, range(10)))) == 9
    assert parse_choice("I think so", list(map(str, range(10)))) is None
    assert parse_choice("B", []) is None
    assert parse_choice("", ANIMALS) is None


def vlmevalkit(answer: str, choices: Sequence[str]) -> int | None:
    """VLMEvalKit's exact matching: the only option letter among the words, else the only text."""
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    found = [n for n in range(len(choices)) if LETTERS[n] in words]
    if len(found) == 1:
        return found[0]
    named = [n for n, text in enumerate(choices) if text.lower() in answer.lower()]
    return named[0] if len(named) == 1 else None


OPTIONS = (
    ANIMALS,
    COLOURS,
    ("a street at night", "a plate of food", "a football match", "a temple by a lake"),
    ("1", "2", "3", "4"),
    ("The man is sitting", "The man is standing", "The man is running"),
)
# {L} and {t} are the meant option's letter and text, {M} and {u} another one's.
TEMPLATES = (
    "{L}", "{L}.", "({L})", "{L}. {t}", "{L}: {t}", "({L}) {t}.", "{t}", "{t}.", "**{L}**",
    "Answer: {L}", "The answer is {L}.", "The correct answer is ({L}) {t}.", "Option {L}",
    "The correct option is {L}, not {M}.", "I would choose {L}.", "I think it is {L}.",
    "Based on the image, the best answer is {L}.", "It must be {L} because of the picture.",
    "{L} is correct.", "{M} is wrong. {L} is right.", "Sure! The answer is {L}: {t}",
    "A closer look shows {t}.", "I believe the answer is {t}.", "It is not {M}; it is {L}.",
    "Option {M} does not match. Therefore, the answer is {L}.", "A person would say {L}.",
    "I see it clearly: {t}", "The answer is {t}, not {u}.", "We can rule out {M}, so {L}.",
    "Looking at A and the rest of the options, I pick {L}.",
)  # fmt: skip


def test_no_synthetic_answer_is_misread_and_recall_is_at_least_vlmevalkits() -> None:
    rng = random.Random(0)
    counts: Counter[str] = Counter()
    misread = []
    for template in TEMPLATES:
        for _ in range(12):
            choices = rng.choice(OPTIONS)
            meant, other = rng.sample(range(len(choices)), 2)
            answer = template.format(
                L=LETTERS[meant], t=choices[meant], M=LETTERS[other], u=choices[other]
            )
            ours, theirs = parse_choice(answer, choices), vlmevalkit(answer, choices)
            counts["all"] += 1
            counts["ours"] += ours == meant
            counts["theirs"] += theirs == meant
            if ours not in (meant, None):
                misread.append((answer, LETTERS[ours]))
    assert misread == []
    assert counts["all"] == 360
    assert counts["ours"] >= 0.97 * counts["all"]
    assert counts["ours"] > counts["theirs"]


def test_long_degenerate_answers_are_read_quickly() -> None:
    for text in ("A, " * 1000, "answer is " * 1000 + "B", "not A, B or " * 500, "(" * 5000 + "B"):
        parse_choice(text, ANIMALS)
