"""LLaVA-1.5's two prompts (`docs/Evaluation.md` of github.com/haotian-liu/LLaVA)."""

from collections.abc import Sequence

from tita.bench.choice_answers import LETTERS

SHORT_PROMPT = "Answer the question using a single word or phrase."
LETTER_PROMPT = "Answer with the option's letter from the given choices directly."


def with_options(question: str, choices: Sequence[str]) -> str:
    """The question with LLaVA-1.5's prompt for multiple choice."""
    listed = "".join(
        f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)
    )
    return f"{question}{listed}\n{LETTER_PROMPT}"
