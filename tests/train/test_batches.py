"""Batches and rows equal TRL's own and those of inference."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from tests.train.comparing import assert_batches_of_trl
from tita.data import read_pairs
from tita.demo.models import demo_model_path
from tita.errors import TitaError
from tita.records import Question
from tita.storage import open_store
from tita.storage.manifest import sha256_of
from tita.train import reference
from tita.train.collators import AnswerCollator, PairCollator
from tita.train.negatives import choose_negatives
from tita.train.reference import recall_reference
from tita.train.reference import reference_key as key_of
from tita.train.shared_images import encode_images_once
from tita.train.training_data import TrainInputs, make_dataset
from tita.vlm.images import open_image
from tita.vlm.inputs import prepare
from tita.vlm.loading import load_vlm
from tita.vlm.prompts import Prompt

MODEL = str(demo_model_path("reward"))


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def rows(data: Any, processor: Any) -> Any:
    pairs = list(read_pairs(data.pairs))
    return make_dataset(pairs, images=data.images, processor=processor, image_aspect="pad")


def test_batches_are_those_of_trl(rows: Any, processor: Any) -> None:
    assert_batches_of_trl(rows, number=5, processor=processor)


def test_images_encoded_once_give_the_same_log_probabilities(rows: Any, processor: Any) -> None:
    batch = PairCollator(processor)([rows[i] for i in range(4)])
    del batch["completion_mask"]
    model = load_vlm(MODEL, dtype="float32").model
    seen = []
    model.model.vision_tower.register_forward_hook(
        lambda _module, _arguments, out: seen.append(len(out.last_hidden_state))
    )
    with torch.no_grad():
        twice = model(**batch).logits
        assert encode_images_once(model) is not None
        once = model(**batch).logits
    assert seen == [8, 4]
    torch.testing.assert_close(once, twice, rtol=1e-5, atol=1e-5)


def test_prompts_are_those_of_inference(rows: Any, processor: Any, data: Any) -> None:
    vlm = load_vlm(MODEL, dtype="float32")
    pair = next(iter(read_pairs(data.pairs)))
    image = open_image(data.images / pair.image)
    asked = prepare(vlm, [Prompt(text=pair.question, images=(image,))])
    batch = PairCollator(processor)([rows[0]])
    prompt = batch["input_ids"][0][
        (batch["completion_mask"][0] == 0) & (batch["attention_mask"][0] == 1)
    ]
    assert torch.equal(prompt, asked["input_ids"][0])
    assert torch.equal(batch["pixel_values"][0], asked["pixel_values"][0])
    answer = batch["input_ids"][0][batch["completion_mask"][0] == 1]
    assert answer[-1] == processor.tokenizer.eos_token_id
    assert processor.tokenizer.decode(answer, skip_special_tokens=True).strip() == pair.chosen


def test_the_reference_key_depends_on_all_inputs(data: Any) -> None:
    pairs = tuple(read_pairs(data.pairs))
    start = TrainInputs(
        model=MODEL,
        model_name=MODEL,
        image_aspect="pad",
        pairs=pairs,
        pairs_path=data.pairs,
        answers=(),
        images=data.images,
        image_digests={pair.image: sha256_of(data.images / pair.image) for pair in pairs},
    )

    def reference_key(start: TrainInputs, dtype: str, ld_alpha: float | None = None) -> str:
        negatives = start.negatives
        return key_of(start, pairs=start.pairs, negatives=negatives, dtype=dtype, ld_alpha=ld_alpha)

    key = reference_key(start, dtype="float32")
    assert key == reference_key(start, dtype="float32")
    others = [
        reference_key(replace(start, pairs=pairs[1:]), dtype="float32"),
        reference_key(replace(start, model=str(demo_model_path("base"))), dtype="float32"),
        reference_key(replace(start, image_aspect="keep"), dtype="float32"),
        reference_key(
            replace(start, image_digests=dict(start.image_digests) | {pairs[0].image: "0"}),
            dtype="float32",
        ),
        reference_key(start, dtype="bfloat16"),
        reference_key(start, dtype="float32", ld_alpha=0.5),
    ]
    negatives = {
        seed: choose_negatives(pairs, kind="other", digests=start.image_digests, seed=seed)
        for seed in (0, 1)
    }
    crops = choose_negatives(pairs, kind="crop", digests=start.image_digests, seed=0)
    others += [
        reference_key(replace(start, negatives=some), dtype="float32")
        for some in (*negatives.values(), crops)
    ]
    assert len({key, *others}) == 10


def saved(**parts: list[float]) -> bytes:
    body = io.BytesIO()
    arrays: dict[str, Any] = {k: np.array(v, dtype=np.float32) for k, v in parts.items()}
    np.savez(body, **arrays)
    return body.getvalue()


def test_a_reference_is_computed_once_and_continued(
    tmp_path: Path, lone_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path / "store"))
    monkeypatch.setattr(reference, "STORE_EVERY_S", 0.0)
    wanted = [1.5, 2.5, 3.5, 4.5], [0.5, -1.0, 0.0, 2.0]
    computed: list[int] = []

    def found(stop_at: int = 9) -> Any:
        def compute(first: int, add: Any) -> None:
            for number in range(first, 4):
                if number == stop_at:
                    raise KeyboardInterrupt
                computed.append(number)
                add([[part[number]] for part in wanted])

        return recall_reference(compute, key=lambda: "cache/x.npz", store=store, num_pairs=4)

    for stop_at in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            found(stop_at)
    assert list(map(tuple, found())) == list(map(tuple, wanted))
    assert computed == [0, 1, 2, 3]
    assert [info.key for info in store.list()] == ["cache/x.npz"]
    assert list(map(tuple, found())) == list(map(tuple, wanted))
    assert computed == [0, 1, 2, 3]
    whole = saved(chosen=[1, 2, 3, 4], rejected=[1, 2, 3, 4])
    for damage in (whole[:-9], saved(chosen=[1, 2, 3, 4], rejected=[1]), b"{}"):
        store.put("cache/x.npz", damage)
        with pytest.raises(TitaError, match="delete it"):
            found()
    # All parts, without the object that replaces them; parts of two passes overlap.
    store.delete("cache/x.npz")
    store.put("cache/x/0-3.npz", saved(chosen=[1, 2, 3], rejected=[1, 2, 3]))
    store.put("cache/x/2-4.npz", saved(chosen=[3, 4], rejected=[3, 4]))
    assert [part.tolist() for part in found()] == [[1, 2, 3, 4]] * 2
    assert [info.key for info in store.list()] == ["cache/x.npz"]
    assert computed == [0, 1, 2, 3]


def test_only_answers_are_labels(data: Any, processor: Any) -> None:
    pairs = list(read_pairs(data.pairs))[:3]
    questions = [
        Question(id=pair.id, text=pair.question, image=pair.image, references=(pair.chosen,))
        for pair in pairs
    ]
    options: dict[str, Any] = {"images": data.images, "processor": processor, "image_aspect": "pad"}
    answers = make_dataset(questions, **options)
    batch = AnswerCollator(processor)([answers[i] for i in range(3)])
    both = PairCollator(processor)([make_dataset(pairs, **options)[i] for i in range(3)])
    width = batch["input_ids"].shape[1]
    mask = batch["attention_mask"]
    # The same as the chosen half of a batch of pairs.
    assert torch.equal(batch["input_ids"] * mask, (both["input_ids"][:3, :width]) * mask)
    assert torch.equal(batch["labels"] != -100, both["completion_mask"][:3, :width] == 1)
    assert torch.equal(batch["pixel_values"], both["pixel_values"][:3])
