"""Warnings at the start of a report: questions without an answer, an image or their options."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def report_warnings(report: Mapping[str, Any]) -> list[str]:
    """What is missing or failed, the report's notes, and doubts about the questions."""
    runs = report["runs"]
    return [*_texts(runs, missing_text), *report.get("notes", ()), *_texts(runs, *_DOUBTS)]


def run_warnings(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The same for runs that are compared."""
    return _texts(runs, missing_text, *_DOUBTS)


def _texts(
    runs: Sequence[Mapping[str, Any]], *checks: Callable[[Mapping[str, Any]], str]
) -> list[str]:
    return [text for check in checks for run in runs if (text := check(run))]


def missing_text(run: Mapping[str, Any]) -> str:
    """How many questions of a run have no answer, and why; empty if all have one."""
    num_missing = run["num_questions"] - run["num_answered"]
    if not num_missing:
        return ""
    kinds = [f"{count} x {kind}" for kind, count in run["errors"].items() if count]
    if run["num_not_asked"]:
        kinds.append(f"{run['num_not_asked']} not asked")
    return (
        f"INCOMPLETE: {run['title']} ({run['file']}) has no answer to {num_missing} of "
        f"{run['num_questions']} questions: {', '.join(kinds)}"
    )


def no_image_text(run: Mapping[str, Any]) -> str:
    """That a run sent no image with any question; empty if it sent one, or it is not known."""
    num_asked = run["num_questions"] - run["num_not_asked"]
    if not run["num_without_image"] or run["num_without_image"] < num_asked:
        return ""
    number = f"{num_asked} question{'' if num_asked == 1 else 's'}"
    return (
        f"NO IMAGES: {run['title']} ({run['file']}) asked {number}, all without an image; if they "
        "are about images, check the image column of the question file"
    )


def hidden_options_text(run: Mapping[str, Any]) -> str:
    """How many questions of a run did not show their options; empty if all did."""
    number = run["num_hidden_options"]
    if not number:
        return ""
    return (
        f"OPTIONS NOT SHOWN: {run['title']} ({run['file']}) asked {number} questions for an option "
        "without the options in the text, so that the model could not know their letters; "
        "write them in the question"
    )


_DOUBTS = (no_image_text, hidden_options_text)
