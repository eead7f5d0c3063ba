"""Scenes: separate splits, correct answers, files in the layout of SeVa's datasets."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from tita.data import read_questions
from tita.demo.scenes import (
    _SCANS,
    INKS,
    AnnotatorBias,
    Scene,
    make_scenes,
    usual_ink,
    write_scenes,
)
from tita.demo.tiny_llava import make_processor
from tita.vlm.images import open_image


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return make_scenes("test", number=300)


def test_splits_are_disjoint_and_complete() -> None:
    everything = np.arange(len(load_digits().images))
    parts = [set(everything[part]) for part in _SCANS.values()]
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(everything)


def test_answers_are_correct(scenes: list[Scene]) -> None:
    for scene in scenes:
        digits = {str(digit.value): digit.ink for digit in scene.digits}
        reading, attribute, existence = scene.questions
        assert reading.references == (" ".join(str(digit.value) for digit in scene.digits),)
        assert attribute.references == (digits[attribute.text.split()[-1].rstrip("?")],)
        assert existence.references == ("yes" if existence.text.split()[3] in digits else "no",)


def test_existence_and_inks_are_balanced(scenes: list[Scene]) -> None:
    yes = sum(scene.questions[2].references == ("yes",) for scene in scenes)
    assert 0.4 < yes / len(scenes) < 0.6
    inks = Counter(digit.ink for scene in scenes for digit in scene.digits)
    assert set(inks) == set(INKS)
    assert min(inks.values()) > 0.15 * sum(inks.values())


def test_biased_annotators_ignore_the_image() -> None:
    for scene in make_scenes("pretrain", number=20, bias=AnnotatorBias(ink=1, yes=1)):
        _, attribute, existence = scene.questions
        asked = int(attribute.text.split()[-1].rstrip("?"))
        assert attribute.references == (usual_ink(asked),)
        assert existence.references == ("yes",)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    def digest(name: str, seed: int) -> str:
        root = tmp_path / name
        write_scenes(root, make_scenes("train", number=10, seed=seed), name="train")
        content = b"".join(path.read_bytes() for path in sorted(root.rglob("*.*")))
        return hashlib.sha256(content).hexdigest()

    assert digest("a", 0) == digest("b", 0)
    assert digest("c", 1) != digest("a", 0)


def test_written_scenes_are_read_unchanged(scenes: list[Scene], tmp_path: Path) -> None:
    written = write_scenes(tmp_path, scenes[:20], name="test")
    assert list(read_questions(tmp_path / "test.jsonl")) == written
    assert {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")} == {
        "ocrvqa/images",
        "texvqa/train_images",
    }
    for scene in scenes[:20]:
        image = open_image(tmp_path / str(scene.questions[0].image))
        np.testing.assert_allclose(np.asarray(image) / 255, scene.pixels, atol=1e-6)


def test_the_tokenizer_knows_every_word(scenes: list[Scene]) -> None:
    texts = [question.text for scene in scenes for question in scene.questions]
    answers = [question.references[0] for scene in scenes for question in scene.questions]
    words = {w for t in texts + answers for w in t.lower().replace("?", " ?").split()}
    assert words <= make_processor().tokenizer.get_vocab().keys()
