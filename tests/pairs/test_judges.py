"""The judge `exact-match`, and when two answers agree."""

from pathlib import Path

import pytest

from tita.errors import TitaError
from tita.pairs.build import agree as answers_agree
from tita.pairs.judges import Candidate, Preference, apply_judge, exact_match
from tita.records import Question


@pytest.mark.parametrize(
    ("chosen", "rejected", "preference"),
    [
        ("The Cat.", "dog", Preference(better="chosen")),
        ("dog", "cat", Preference(better="rejected")),
        ("cat", "a kitten", Preference(better="neither", reason="both right")),
        ("dog", "cow", Preference(better="neither", reason="both wrong")),
    ],
)
def test_exact_match_prefers_an_answer_that_equals_a_reference(
    chosen: str, rejected: str, preference: Preference
) -> None:
    question = Question(id="1", text="What?", image="1.png", references=("cat", "Kitten"))
    candidate = Candidate(question=question, image=Path("1.png"), chosen=chosen, rejected=rejected)
    assert exact_match([candidate]) == [preference]


def test_the_letter_of_a_choice_is_no_article() -> None:
    question = Question(id="1", text="A, B or C?", image="1.png", references=("A",))
    candidate = Candidate(question=question, image=Path("1.png"), chosen="A", rejected="The")
    assert exact_match([candidate]) == [Preference(better="chosen")]


def test_a_preference_that_is_not_known_is_refused_and_swaps_nothing() -> None:
    question = Question(id="1", text="What?", image="1.png")
    candidate = Candidate(question=question, image=Path("1.png"), chosen="x", rejected="y")
    wrong = Preference(better="Chosen")  # type: ignore[arg-type]
    with pytest.raises(TitaError, match="a preference of 'Chosen'; set `better` to one of chosen"):
        apply_judge(lambda _: [wrong], [candidate], name="mine")


@pytest.mark.parametrize(
    ("one", "other", "agree", "exact"),
    [
        ("A cat.", "the cat", True, False),
        ("Two", "2", True, False),
        ("It isn't!", "it isnt", True, False),
        ("yes", "no", False, False),
        ("A", "The", False, False),
        ("3.5", "35", False, False),
        ("a  cat\n", "a cat", True, True),
    ],
)
def test_answers_that_differ_only_in_form_agree(
    one: str, other: str, agree: bool, exact: bool
) -> None:
    assert answers_agree(one, other, exact=False) == agree
    assert answers_agree(one, other, exact=True) == exact
