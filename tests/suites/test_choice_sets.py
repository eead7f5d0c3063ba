"""MMStar, RealWorldQA and MMMU: published layouts, hand-worked answers, other implementations."""

import random
import re
from pathlib import Path
from typing import Any

import pytest

from tests.suites.published import answered, encoded, figures, png, read
from tita.bench.scoring import score_answer
from tita.errors import TitaError
from tita.suites.choice_sets import options_in

IMAGE = {"bytes": png(), "path": None}


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("What is it?\nOptions: A: a cat, B: a dog, C: 1, 2 or 3, D: none",
         ("a cat", "a dog", "1, 2 or 3", "none")),
        ("Which way?\n\nA. Left\nB. Right\nPlease answer directly.", ("Left", "Right")),
        ("Plan B: what is it?\nA. One\nB. Two", ("One", "Two")),
        ("(A) red\n(B) blue", ("red", "blue")),
        ("Which?\nC. 2019\nA. One\nB. Two", ("One", "Two")),
        ("What is the speed limit?", ()),
        ("Vitamin A: what is it for?", ()),
        ("", ()),
    ],
)  # fmt: skip
def test_options_in_a_question(question: str, options: tuple[str, ...]) -> None:
    assert options_in(question) == options


def test_mmstar_as_parquet_and_as_table(tmp_path: Path) -> None:
    question = "What is shown?\nOptions: A: a cat, B: a dog, C: a cow, D: a pig"
    row = {
        "index": 0, "question": question, "image": png(), "answer": "B", "category": "math",
        "l2_category": "geometry",
    }  # fmt: skip
    (item,) = read("mmstar", tmp_path / "one", {"mmstar.parquet": [row]})
    assert item.text.endswith("given choices directly.")
    assert item.text.count("A: a cat") == 1
    head = "index\tquestion\tA\tB\tC\tD\tanswer\tcategory\timage"
    line = f"0\tWhat is shown?\ta cat\ta dog\ta cow\t\tB\tmath\t{encoded(png())}"
    (other,) = read("mmstar", tmp_path / "two", {"MMStar.tsv": f"{head}\n{line}\n"})
    assert other.choices == ("a cat", "a dog", "a cow")
    assert "\nC. a cow\n" in other.text
    for each, folder in ((item, "one"), (other, "two")):
        assert (tmp_path / folder / "out" / each.images[0]).read_bytes() == png()
        # The letter counts, not an article or an option that is rejected.
        found = figures("mmstar", [answered(each, "A dog, so not A but B.")], tmp_path / folder)
        assert (found["accuracy"], found["math"]) == (100, 100)
        found = figures("mmstar", [answered(each, "A.")], tmp_path / folder)
        assert found["accuracy"] == 0


def test_real_world_qa(tmp_path: Path) -> None:
    choice = "Which way?\n\nA. Left\nB. Right\nC. Straight\nPlease answer directly."
    rows = [
        {"image": IMAGE, "question": choice, "answer": "C"},
        {"image": IMAGE, "question": "How many cars?", "answer": "3"},
        {"image": IMAGE, "question": "Is the hill steep? Answer in one word.", "answer": "Yes"},
    ]
    items = read("realworldqa", tmp_path, {"data/test-00000-of-00001.parquet": rows})
    assert [item.metric for item in items] == ["choice", "real-world-qa", "real-world-qa"]
    said = ["Straight", "3.", "Yes, it is"]  # the last is not the one word that was asked for
    answers = [answered(item, text) for item, text in zip(items, said, strict=True)]
    found = figures("realworldqa", answers, tmp_path)
    assert found["accuracy"] == pytest.approx(200 / 3)
    assert (found["choice"], found["open"]) == (100, 50)


def test_real_world_qa_equals_a_plain_rule_on_500_plain_answers(tmp_path: Path) -> None:
    draw = random.Random(8)
    rows = []
    for n in range(500):
        is_choice = draw.random() < 0.5
        options = "A. Left\nB. Right\nC. Straight" if is_choice else "Answer in one word."
        answer = draw.choice("ABC") if is_choice else draw.choice(["Yes", "3", "Red"])
        rows.append({"image": IMAGE, "question": f"Number {n}?\n{options}", "answer": answer})
    items = read("realworldqa", tmp_path, {"test.parquet": rows})
    said = [draw.choice(["A", "B.", "(C)", "yes", "Yes.", "3", "red", "3 cars"]) for _ in items]
    answers = [answered(item, text) for item, text in zip(items, said, strict=True)]
    right = [
        text.strip("().").lower() == str(row["answer"]).lower()
        for row, text in zip(rows, said, strict=True)
    ]
    assert 50 < sum(right) < 250
    assert figures("realworldqa", answers, tmp_path)["accuracy"] == pytest.approx(sum(right) / 5)


MMMU_ROWS = [
    {
        "id": "validation_Math_1", "question": "<image 1> What is x?", "options": "['1', '2']",
        "answer": "B", "question_type": "multiple-choice", "image_1": IMAGE, "image_2": None,
    },
    {
        "id": "validation_Art_Theory_2", "question": "Who painted <image 1>?", "options": "[]",
        "answer": "['Monet', 'Claude Monet']", "question_type": "open", "image_1": IMAGE,
        "image_2": None,
    },
]  # fmt: skip


def test_mmmu(tmp_path: Path) -> None:
    choice, text = read("mmmu", tmp_path, {"Math/validation-00000-of-00001.parquet": MMMU_ROWS})
    assert (choice.choices, choice.references) == (("1", "2"), ("B",))
    assert text.references == ("Monet", "Claude Monet")
    found = figures(
        "mmmu", [answered(choice, "B"), answered(text, "The painter is Manet.")], tmp_path
    )
    assert (found["accuracy"], found["Science"], found["Art and Design"]) == (50, 100, 0)


@pytest.mark.parametrize("options", ["['1', 2 3]", "['1' '2']", "[{1}, {[2]}]"])
def test_mmmu_refuses_options_that_are_no_list(tmp_path: Path, options: str) -> None:
    rows = [MMMU_ROWS[0] | {"options": options}]
    with pytest.raises(TitaError, match="is not a list"):
        read("mmmu", tmp_path, {"validation-0.parquet": rows})


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("The answer is 3.14159", "3.14", True),  # two decimals
        ("So x = 1,234.50.", "1234.5", True),
        ("It is 12 or 13", "13", True),  # every number in the key sentence
        ("There are 7. The result is 8", "7", False),  # the sentence without a lead is no key
        ("answer is Claude Monet, of course", "claude monet", True),
        ("b", "b", True),
        ("bus", "b", False),  # one character must stand beside a space
        ("red bus", "b", True),  # of any word
        ("the result is b ", "c", False),
        ("-5", "5", False),
        ("", "5", False),
    ],
)
def test_mmmu_open_answers(answer: str, reference: str, right: bool) -> None:
    scored = score_answer("mmmu-open", answer, references=(reference,))
    assert scored is not None
    assert scored.score == float(right)


def second_open(answer: str, references: list[str]) -> float:
    """MMMU's rule for open answers, by cutting at leads with one regular expression."""
    text = answer.strip().strip(".").lower()
    parts = re.split(r"\.\s(?=[A-Z])|\n", text)
    leads = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]
    keys = []
    for number, part in enumerate(parts):
        pool = leads + (["="] if number == len(parts) - 1 else [])
        tails = [part[part.rindex(lead) + len(lead) :].strip() for lead in pool if lead in part]
        # An empty tail forgets those before it.
        tails = tails[len(tails) - tails[::-1].index("") :] if "" in tails else tails
        if tails and min(tails, key=len) not in list(":,.!?;'"):
            keys.append(min(tails, key=len))
    keys = keys or [text]
    for key in list(keys):
        keys += re.findall(r"-?\b\d{1,3}(?:,\d{3})+\b", key)
        keys += re.findall(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])", key)

    def number_of(value: str) -> float | None:
        try:
            return round(float(value.replace(",", "")), 2)
        except ValueError:
            return None

    for reference in references:
        wanted = number_of(reference)
        for key in keys:
            given = number_of(key)
            if wanted is not None and given == wanted:
                return 1.0
            if wanted is None and given is None:
                plain = reference.strip().lower()
                single = key.strip() if len(key.strip()) > 1 else f" {key} "
                if len(plain) == 1 and (f" {plain}" in single or f"{plain} " in single):
                    return 1.0
                if len(plain) > 1 and plain in key:
                    return 1.0
    return 0.0


def test_mmmu_equals_another_implementation_on_500_answers() -> None:
    draw = random.Random(4)
    words = ["so", "is", "the", "answer", "result", "=", "42", "3.50", "1,200", "-7", "Monet",
             "blue sky", "x", ".", "\n", "therefore", "final", "0.333"]  # fmt: skip
    references = ["42", "3.5", "1200", "-7", "monet", "blue sky", "x", "0.33"]
    scores = []
    for _ in range(500):
        text = " ".join(draw.choices(words, k=draw.randint(1, 9)))
        wanted = draw.sample(references, k=draw.randint(1, 2))
        scored = score_answer("mmmu-open", text, references=wanted)
        assert scored is not None
        assert scored.score == second_open(text, wanted), (text, wanted)
        scores.append(scored.score)
    assert 100 < sum(scores) < 400


def test_choices_equal_a_plain_rule_on_500_plain_answers(tmp_path: Path) -> None:
    """Where an answer is a letter in any of the usual forms, every published scorer agrees."""
    draw = random.Random(5)
    rows: list[dict[str, Any]] = [
        {
            "index": n, "image": png(), "answer": draw.choice("ABCD"), "category": "math",
            "question": f"Number {n}?\nOptions: A: one, B: two, C: three, D: four",
            "l2_category": "",
        }
        for n in range(500)
    ]  # fmt: skip
    items = read("mmstar", tmp_path, {"mmstar.parquet": rows})
    forms = ["{}", "{}.", "({})", "The answer is {}.", "Option {}", "{}: it fits", "**{}**"]
    said = [draw.choice("ABCD") for _ in items]
    answers = [
        answered(item, draw.choice(forms).format(letter))
        for item, letter in zip(items, said, strict=True)
    ]
    right = sum(row["answer"] == letter for row, letter in zip(rows, said, strict=True))
    assert figures("mmstar", answers, tmp_path)["accuracy"] == pytest.approx(100 * right / 500)
