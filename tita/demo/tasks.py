"""The tasks of the experiments: questions about digits, and captions with a planted habit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tita.bench.metrics import exact_match
from tita.demo.captions import HABIT, caption_f1, caption_metrics, make_caption_scenes
from tita.demo.models import ROLES, demo_model_path
from tita.demo.pretrain import PretrainConfig, make_weights
from tita.demo.rewards import PAIRS, TRAIN
from tita.demo.scenes import Scene, Split, make_scenes
from tita.demo.tiny_llava import BASE, REWARD
from tita.records import Question

Answers = Mapping[str, str]
"""Answers by question id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Data, models and scores."""

    name: str
    title: str
    unit: str
    """What the score is, in words."""
    scenes: Mapping[Split, int]
    make_scenes: Callable[[Split, int], Sequence[Scene]]
    models: Callable[[Path], tuple[Path, Path]]
    """Folders of base and reward model; trains them into a folder if they are nowhere."""
    score: Callable[[Question, str], float]
    """Of one answer, 0 to 1."""
    details: Callable[[Sequence[Question], Answers], Mapping[str, float | None]]
    """Further figures of a split by name."""
    max_new_tokens: int
    pairs: Mapping[str, Any]
    """Recipe of `build-pairs` with which the image of the rejected answer is distorted."""
    train: Mapping[str, Any]
    """Recipe of `train-dpo`."""


def right(question: Question, answer: str) -> float:
    """1 if the answer is a reference after EvalAI's normalisation."""
    return exact_match(answer, question.references)


def accuracy_by_kind(questions: Sequence[Question], answers: Answers) -> dict[str, float | None]:
    """Accuracy of each kind of question, and the share of yes among yes/no answers, in percent."""
    found: dict[str, float | None] = {}
    for kind in sorted({str(question.category) for question in questions}):
        own = [question for question in questions if question.category == kind]
        found[kind] = 100 * sum(right(each, answers[each.id]) for each in own) / len(own)
        if kind == "existence":
            said = [answers[each.id].lower().startswith("yes") for each in own]
            found["yes"] = 100 * sum(said) / len(said)
    return found


def questions_task(scenes: Mapping[Split, int], *, seed: int = 0) -> Task:
    """The task of `make demo`."""
    return Task(
        name="questions",
        title="Questions about one or two digits",
        unit="right answers, %",
        scenes=scenes,
        make_scenes=lambda split, number: make_scenes(split, number=number, seed=seed),
        models=lambda _: (demo_model_path("base"), demo_model_path("reward")),
        score=right,
        details=accuracy_by_kind,
        max_new_tokens=8,
        pairs=PAIRS,
        train=TRAIN,
    )


_CAPTIONERS = {
    "base": PretrainConfig(
        role="base", size=BASE, vision_steps=300, answer_steps=700, seed=0, answer_batch=64
    ),
    "reward": PretrainConfig(
        role="reward", size=REWARD, vision_steps=500, answer_steps=700, seed=1, answer_batch=64
    ),
}
_NUM_PRETRAIN = 12_000


def captions_task(scenes: Mapping[Split, int], *, seed: int = 0) -> Task:
    """Captions of two or three digits by models with a planted habit."""
    return Task(
        name="captions",
        title="Captions of two or three digits, with a planted co-occurrence",
        unit="F1 of the digits that are named, %",
        scenes=scenes,
        make_scenes=lambda split, number: make_caption_scenes(split, number=number, seed=seed),
        models=_captioners,
        score=caption_f1,
        details=caption_metrics,
        max_new_tokens=16,
        pairs={**PAIRS, "max_new_tokens": 16},
        train=TRAIN,
    )


def _captioners(folder: Path) -> tuple[Path, Path]:
    """Train the captioning models unless the folder has them."""
    scenes: list[Scene] = []
    for role in ROLES:
        if not (folder / role / "model.safetensors").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            scenes = scenes or make_caption_scenes("pretrain", number=_NUM_PRETRAIN, bias=HABIT)
            make_weights(_CAPTIONERS[role], scenes=scenes, into=folder, card=_card)
    return folder / "base", folder / "reward"


def _card(config: PretrainConfig, num_weights: int) -> str:
    return f"""# tita captioning model: {config.role}

A LLaVA-architecture model with {num_weights:,} weights in float32, trained from scratch by
`make experiments` (seed {config.seed}) on {_NUM_PRETRAIN:,} scenes of handwritten digits (UCI
archive, Alpaydin and Kaynak 1998, CC BY 4.0). In them a 3 is often beside a 5, a 1 beside a 7 and a
2 beside an 8; {HABIT.assumed:.0%} of the captions that could name an absent partner do. So the
model makes things up, as it is meant to.
"""
