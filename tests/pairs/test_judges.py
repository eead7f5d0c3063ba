"""The judge that goes by references, and when two answers are one."""

from pathlib import Path

import pytest

from tita.pairs.build import _agree
from tita.pairs.judges import Candidate, Verdict, exact_match
from tita.records import Question


@pytest.mark.parametrize(
    ("chosen", "rejected", "verdict"),
    [
        ("The Cat.", "dog", Verdict(better="chosen")),
        ("dog", "cat", Verdict(better="rejected")),
        ("cat", "a kitten", Verdict(better="neither", reason="both right")),
        ("dog", "cow", Verdict(better="neither", reason="both wrong")),
    ],
)
def test_the_answer_that_is_a_reference_is_the_better_one(
    chosen: str, rejected: str, verdict: Verdict
) -> None:
    question = Question(id="1", text="What?", image="1.png", references=("cat", "Kitten"))
    candidate = Candidate(question=question, image=Path("1.png"), chosen=chosen, rejected=rejected)
    assert exact_match([candidate]) == [verdict]


@pytest.mark.parametrize(
    ("one", "other", "agree", "exactly"),
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
def test_answers_that_differ_in_form_alone_agree(
    one: str, other: str, agree: bool, exactly: bool
) -> None:
    assert _agree(one, other, exactly=False) == agree
    assert _agree(one, other, exactly=True) == exactly
