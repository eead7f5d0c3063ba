"""Scenes of digits in the layouts of CHAIR and AMBER, and models with a planted effect."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from tita.demo.scenes import Scene, make_scenes

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass
class Digits:
    """Published files below a folder, and what is in each image."""

    source: Path
    present: dict[str, list[int]] = field(default_factory=dict)
    """Digits by SHA-256 of the image file."""

    def ask(self, model: "PlantedModel", question: str, image: bytes, *, method: str) -> str:
        digest = hashlib.sha256(image).hexdigest()
        # Scenes with the same digits must not get the same answer.
        return model.answer(question, self.present[digest], method=method, draw=digest)


def write_digits(source: Path, *, number: int) -> Digits:
    """CHAIR's and AMBER's files on scenes of one or two digits."""
    digits = Digits(source)
    scenes = make_scenes("test", number=number)
    for index, scene in enumerate(scenes, start=1):
        path = source / "images" / f"COCO_val2014_{index:012d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.round(scene.pixels * 255).astype(np.uint8)).save(path)
        content = path.read_bytes()
        digits.present[hashlib.sha256(content).hexdigest()] = [d.value for d in scene.digits]
        # AMBER has images of its own name.
        (source / "images" / f"AMBER_{index}.png").write_bytes(content)
    _write_chair(source / "coco", scenes)
    _write_amber(source / "AMBER", scenes)
    return digits


def _write(folder: Path, files: Mapping[str, Any]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def _write_chair(folder: Path, scenes: Sequence[Scene]) -> None:
    images = [
        {"id": n, "file_name": f"COCO_val2014_{n:012d}.png"} for n in range(1, len(scenes) + 1)
    ]
    boxes = [
        {"image_id": n, "category_id": digit.value}
        for n, scene in enumerate(scenes, start=1)
        for digit in scene.digits
    ]
    captions = [
        {"image_id": n, "caption": caption(digit.value for digit in scene.digits)}
        for n, scene in enumerate(scenes, start=1)
    ]
    categories = [{"id": n, "name": word} for n, word in enumerate(WORDS)]
    _write(
        folder,
        {
            "instances_val2014.json": {
                "images": images, "annotations": boxes, "categories": categories,
            },
            "captions_val2014.json": {"annotations": captions},
            "synonyms.txt": "".join(f"{word}, {n}\n" for n, word in enumerate(WORDS)),
        },
    )  # fmt: skip


def _write_amber(folder: Path, scenes: Sequence[Scene]) -> None:
    annotations: list[dict[str, Any]] = []
    queries: list[dict[str, Any]] = []

    def add(kind: str, query: str, image: int, **truth: Any) -> None:
        identity = len(annotations) + 1
        annotations.append({"id": identity, "type": kind, **truth})
        queries.append({"id": identity, "image": f"AMBER_{image}.png", "query": query})

    for n, scene in enumerate(scenes, start=1):
        present = [digit.value for digit in scene.digits]
        absent = [value for value in range(10) if value not in present]
        add(
            "generative", "Describe this image.", n, truth=[WORDS[value] for value in present],
            hallu=[WORDS[absent[n % len(absent)]]],
        )  # fmt: skip
        for value, label in ((present[0], "yes"), (absent[n % len(absent)], "no")):
            add("discriminative-hallucination", f"Is there a {WORDS[value]}?", n, truth=label)
    _write(
        folder / "data",
        {
            "annotations.json": annotations, "query/query_all.json": queries,
            "relation.json": {word: [] for word in WORDS}, "safe_words.txt": "light",
        },
    )  # fmt: skip


def caption(values: Any) -> str:
    return "The image shows " + " and ".join(f"a {WORDS[value]}" for value in values) + "."


@dataclass(frozen=True)
class PlantedModel:
    """Answers with a share of made-up digits, and of yes where the truth is no, by method."""

    made_up: Mapping[str, float]
    """Share of captions with a digit that is not there, by `base`, `guided` and `control`."""
    false_yes: Mapping[str, float]
    seed: int = 0

    def answer(self, question: str, present: Sequence[int], *, method: str, draw: str) -> str:
        draws = random.Random(f"{self.seed}{question}{draw}{method}")
        if not question.startswith("Is there"):
            wrong = [value for value in range(10) if value not in present]
            extra = [draws.choice(wrong)] if draws.random() < self.made_up[method] else []
            return caption([*present, *extra])
        asked = next(n for n, word in enumerate(WORDS) if f"a {word}?" in question)
        if asked in present:
            return "Yes." if draws.random() < 0.9 else "No."
        return "Yes." if draws.random() < self.false_yes[method] else "No."


def same(value: float) -> dict[str, float]:
    return dict.fromkeys(("base", "guided", "control"), value)


REAL = PlantedModel(made_up={"base": 0.5, "guided": 0.1, "control": 0.5}, false_yes=same(0.3))
CALIBRATED = PlantedModel(made_up=same(0.4), false_yes={"base": 0.7, "guided": 0.1, "control": 0.1})
NOTHING = PlantedModel(made_up=same(0.4), false_yes=same(0.3))
WORSE = PlantedModel(made_up={"base": 0.1, "guided": 0.6, "control": 0.5}, false_yes=same(0.3))
