"""Row lengths: equal to the token counts of the model's processor."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.families import FAMILIES, built, saved
from tita.cli.commands import app
from tita.cli.main import run
from tita.data.lengths import LengthLimit, load_length_limit
from tita.demo.models import demo_model_path
from tita.vlm.prompts import Prompt, adds_special_tokens, prompt_text

BASE = str(demo_model_path("base"))
QUESTION, ANSWERS = "What number is written?", ["seven", "one two three"]


@pytest.mark.parametrize("family", [*sorted(FAMILIES), "gemma4", "ovis2"])
def test_counts_equal_those_of_the_processor(family: str) -> None:
    _, processor = built(family)
    limit = LengthLimit(processor=processor, max_tokens=1, where=family, pad=False)
    for size in ((40, 40), (90, 50), (40, 40)):
        image = Image.effect_noise(size, 50).convert("RGB")
        text = prompt_text(processor, Prompt(text=QUESTION, images=(image,)))
        ends = [answer + processor.tokenizer.eos_token for answer in ANSWERS]
        whole = max(
            len(
                processor(
                    text=[text + end],
                    images=[[image]],
                    add_special_tokens=adds_special_tokens(processor, text),
                    return_tensors="pt",
                )["input_ids"][0]
            )
            for end in ends
        )
        assert limit.count(QUESTION, ANSWERS, size=size) == whole


def test_rows_longer_than_the_context_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    context = load_length_limit(BASE).max_tokens
    pair = {"image_id": "a.png", "question": "Is it?", "chosen": "yes", "reject": "no"}
    long = {**pair, "reject": "no " * context}
    rows = "".join(json.dumps(row) + "\n" for row in (pair, long))
    (tmp_path / "p.jsonl").write_text(rows)
    assert run(app, ["data", "validate", str(tmp_path), "--model", BASE], name="tita") == 2
    captured = capsys.readouterr()
    (fault,) = captured.out.splitlines()
    assert f"{tmp_path / 'p.jsonl'}:2: " in fault
    assert f"tokens with its image, the limit is {context}; shorten" in fault
    assert ", longest " in captured.err


def test_image_aspect_changes_the_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """InternVL cuts an image into tiles that depend on its aspect ratio; a square is one tile."""
    (tmp_path / "model").mkdir()
    model = str(saved(FAMILIES["internvl"], tmp_path / "model"))
    (tmp_path / "data").mkdir()
    Image.new("RGB", (64, 32)).save(tmp_path / "data" / "a.png")
    row = {"image_id": "a.png", "question": "Is it?", "chosen": "yes", "reject": "no"}
    (tmp_path / "data" / "p.jsonl").write_text(json.dumps(row))

    def longest(*more: str) -> int:
        command = ["data", "validate", str(tmp_path / "data"), "--model", model, "-o", "json"]
        assert run(app, [*command, *more], name="tita") == 0
        found: int = json.loads(capsys.readouterr().out)["longest"]
        return found

    capsys.readouterr()  # DeepSpeed prints when transformers saves a model.

    assert longest() == longest("--image-aspect", "keep") > longest("--image-aspect", "pad")
    assert run(app, ["data", "validate", str(tmp_path), "--image-aspect", "pad"], name="tita") == 2
    assert "--image-aspect: has no effect without a model" in capsys.readouterr().err


def test_images_count(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "q.jsonl").write_text(
        json.dumps({"text": "Is it?", "image": "a.png"}) + "\n" + json.dumps({"text": "Is it?"})
    )
    count = load_length_limit(BASE).count
    with_image = count("Is it?", [], size=(20, 20))
    without = count("Is it?", [], size=None)
    assert with_image > without
    options = ["--model", BASE, "--max-length"]
    command = ["data", "validate", str(tmp_path), *options]
    assert run(app, [*command, str(with_image)], name="tita") == 0
    assert run(app, [*command, str(with_image - 1)], name="tita") == 2
