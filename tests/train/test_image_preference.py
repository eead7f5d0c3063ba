"""The terms that depend on the image: their loss and gradients, negatives, and the tower's work."""

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from trl import DPOConfig

from tests.families import LAYERED, TRAINED, built
from tests.train.comparing import Counted
from tita.data import read_pairs
from tita.data.shortcuts import question_kind
from tita.demo.models import demo_model_path
from tita.errors import TitaError
from tita.recipes import ImagePreferenceRecipe
from tita.records import Pair
from tita.storage.manifest import sha256_of
from tita.train.collators import OTHER_REFERENCE, REFERENCE, PairCollator
from tita.train.contact_sheet import write_contact_sheet
from tita.train.negatives import Negative, choose_negatives
from tita.train.run import CHECKPOINTING
from tita.train.shared_images import encode_images_once, take_inputs
from tita.train.trainer import PairTrainer
from tita.train.training_data import (
    TrainInputs,
    count_tokens,
    make_dataset,
    prompt_token_ids,
)
from tita.vlm.images import open_image
from tita.vlm.loading import load_vlm

LLAVA = str(demo_model_path("reward"))
BETA = 0.3
CACHED = ([-3.0, -1.0, -2.5], [-2.0, -4.0, -1.0], [-2.2, -1.7, -3.1])
"""Reference log-probabilities of three pairs."""


@pytest.fixture(params=["llava", *TRAINED])
def family(request: pytest.FixtureRequest, data: Any, tmp_path: Path) -> tuple[Any, Any, Any]:
    """Model, processor and rows with images of different sizes; two pairs share images."""
    if request.param == "llava":
        model, processor = (
            load_vlm(LLAVA, dtype="float32").model,
            AutoProcessor.from_pretrained(LLAVA),
        )
    else:
        model, processor = built(request.param)
        # TRL multiplies logits by it, as Cohere2 does; transformers' Aya Vision does not.
        model.config.get_text_config().logit_scale = 1.0
    pairs = []
    for number, pair in enumerate(itertools.islice(read_pairs(data.pairs), 3)):
        image = Image.open(data.images / pair.image).resize((40 + 50 * number, 80))
        image.save(tmp_path / f"{number}.png")
        pairs.append(replace(pair, image=f"{number}.png"))
    negatives = [
        Negative(image="1.png"),
        Negative(image="1.png", change="noise", seed=3),
        Negative(image="0.png"),
    ]
    rows = make_dataset(
        pairs, images=tmp_path, processor=processor, image_aspect="keep", negatives=negatives
    )
    return model, processor, rows


def trainer_of(model: Any, processor: Any, rows: Any, folder: Path, **options: Any) -> PairTrainer:
    config = DPOConfig(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=3, beta=BETA,
        learning_rate=1e-3, max_length=None, bf16=False, use_cpu=True, report_to="none",
        save_strategy="no", remove_unused_columns=False, precompute_ref_log_probs=True,
        **{CHECKPOINTING: False}, max_grad_norm=0.0,
    )  # fmt: skip
    return PairTrainer(
        recall=lambda *_: CACHED,
        model=model,
        args=config,
        train_dataset=rows,
        data_collator=PairCollator(processor, model.config.image_token_id),
        processing_class=processor,
        **options,
    )


def answer_log_prob(model: Any, processor: Any, row: Any, answer: str, pictures: str) -> Any:
    """log pi(answer | image, question) of one sequence, from the logits."""
    batch = PairCollator(processor)(
        [
            {
                "prompt": row["prompt"],
                "pictures": row[pictures],
                "chosen": row[answer],
                "rejected": "x",
            }
        ]
    )
    half = {name: value[: len(value) // 2] for name, value in batch.items()}
    answered = half.pop("completion_mask")[:, 1:].bool()
    found = torch.log_softmax(model(**half).logits[:, :-1].float(), dim=-1)
    return found.gather(-1, half["input_ids"][:, 1:, None])[..., 0][answered].sum()


def plain_torch_loss(model: Any, processor: Any, rows: Any, weight: float, anchor: float) -> Any:
    """Equations 1, 5 and 7 of mDPO, one sequence at a time."""
    losses = []
    for number in range(3):
        row = rows[number]
        chosen, rejected, other = (
            answer_log_prob(model, processor, row, answer, pictures) - cached[number]
            for cached, answer, pictures in zip(
                CACHED,
                ("chosen", "rejected", "chosen"),
                ("pictures", "pictures", "other_pictures"),
                strict=True,
            )
        )
        terms = [(1.0, chosen - rejected), (weight, chosen - other), (anchor, chosen)]
        losses.append(sum(-w * torch.log(torch.sigmoid(BETA * d)) for w, d in terms))
    return torch.stack(losses).mean()


def test_loss_and_gradients_equal_a_reference_in_plain_torch(
    family: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    model, processor, rows = family
    model.train()
    expected = plain_torch_loss(model, processor, rows, 0.7, 0.4)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    counted = Counted(model)
    shared = encode_images_once(model)
    trainer = trainer_of(
        model, processor, rows, tmp_path, shared_images=shared,
        image_preference=ImagePreferenceRecipe(weight=0.7, anchor=0.4),
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    order = [CACHED[0].index(value) for value in batch[REFERENCE[0]].tolist()]
    assert sorted(order) == [0, 1, 2]
    assert batch[OTHER_REFERENCE[0]].tolist() == pytest.approx([CACHED[2][n] for n in order])
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, p in model.named_parameters():
        if name in gradients:
            difference = float((p.grad - gradients[name]).abs().max())
            assert difference <= 1e-5 * max(1, largest), name
    # Four distinct images are shown nine times.
    if shared is not None:
        assert (counted.number, len(batch["pixel_values"])) == count_images(processor, rows)
    assert (shared is None) == (model.config.model_type in LAYERED)


def test_parts_of_an_image_go_with_it() -> None:
    """Step 3.7 has any number per image, so there may be as many as images."""
    inputs = {
        "input_ids": torch.arange(12).reshape(3, 4),
        "num_local_patches": torch.tensor([2, 0, 1]),
        "pixel_values": torch.tensor([[1], [2], [3]]),
        "pixel_values_local": torch.tensor([[10], [11], [30]]),
    }
    found = take_inputs(inputs, [2, 0, 1, 0], tokens=[6, 2, 4])
    assert {name: value.flatten().tolist() for name, value in found.items()} == {
        "input_ids": [8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3],
        "num_local_patches": [1, 2, 0, 2],
        "pixel_values": [3, 1, 2, 1],
        "pixel_values_local": [30, 10, 11, 10, 11],
    }


def count_images(processor: Any, rows: Any) -> tuple[int, int]:
    """Rows of `pixel_values` of distinct images, and of all that a batch shows."""

    def number(pictures: Sequence[Any]) -> int:
        images = {"images": [[picture] for picture in pictures]}
        text = {"text": [rows[0]["prompt"]] * len(pictures), "padding": True}
        return len(processor(**images, **text, return_tensors="pt")["pixel_values"])

    own = [rows[n]["pictures"][0] for n in range(3)]
    others = [rows[n]["other_pictures"][0] for n in range(3)]
    # The other images of the first and of the last pair are the second's and the first's own.
    return number([*own, others[1]]), number([*own, *own, *others])


def test_lengths_with_other_images_are_known_without_processing_them(
    family: tuple[Any, Any, Any],
) -> None:
    _, processor, rows = family
    lengths = list(count_tokens(rows, processor=processor))
    for row, length in zip(rows, lengths, strict=True):
        other = {"prompt": row["prompt"], "pictures": row["other_pictures"]}
        own = len(prompt_token_ids(row, processor=processor))
        added = len(prompt_token_ids(other, processor=processor)) - own
        assert length.other_image == length.image + added
    # What an image adds does not depend on the question.
    assert lengths[0].other_image == lengths[1].image
    assert lengths[2].other_image == lengths[0].image


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(LLAVA)


def pairs_with_digests(data: Any) -> tuple[list[Pair], dict[str, str]]:
    pairs = list(read_pairs(data.pairs))
    return pairs, {pair.image: sha256_of(data.images / pair.image) for pair in pairs}


def test_without_terms_a_run_is_unchanged_bit_for_bit(
    data: Any, processor: Any, tmp_path: Path
) -> None:
    pairs, digests = pairs_with_digests(data)
    negatives = choose_negatives(pairs, kind="other", digests=digests, seed=0)

    def train(negatives: Sequence[Negative], preference: ImagePreferenceRecipe | None) -> Any:
        model = load_vlm(LLAVA, dtype="float32").model
        rows = make_dataset(
            pairs[:3], images=data.images, processor=processor, image_aspect="pad",
            negatives=negatives[:3],
        )  # fmt: skip
        trainer = trainer_of(
            model, processor, rows, tmp_path,
            shared_images=encode_images_once(model), image_preference=preference,
        )  # fmt: skip
        trainer.train()
        return model.state_dict()

    plain = train((), None)
    zero = train((), ImagePreferenceRecipe(weight=0, anchor=0))
    assert all(torch.equal(plain[name], zero[name]) for name in plain)
    with_terms = train(negatives, ImagePreferenceRecipe())
    assert not all(torch.equal(plain[name], with_terms[name]) for name in plain)


def test_other_images_belong_to_questions_of_the_same_kind(data: Any) -> None:
    pairs, digests = pairs_with_digests(data)
    alone = replace(pairs[0], id="alone", question="Nobody else asks this")
    pairs.append(alone)
    found = choose_negatives(pairs, kind="other", digests=digests, seed=0)
    kinds: dict[str, set[str]] = {}
    for pair in pairs:
        kinds.setdefault(question_kind(pair.question), set()).add(pair.image)
    assert len(kinds) > 2
    for pair, negative in zip(pairs, found, strict=True):
        assert digests[negative.image] != digests[pair.image]
        assert negative.image in kinds[question_kind(pair.question)] or pair is alone
    assert found == choose_negatives(pairs, kind="other", digests=digests, seed=0)
    assert found != choose_negatives(pairs, kind="other", digests=digests, seed=1)


@pytest.mark.parametrize("question", ["What is this?", "..."])
def test_pairs_that_nearly_all_show_one_image_have_few_draws(
    question: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pair(number: int, image: str) -> Pair:
        return Pair(id=str(number), image=image, question=question, chosen="a", rejected="b")

    pairs = [pair(number, "same.png") for number in range(3_000)]
    pairs[7], pairs[8] = pair(7, "other.png"), pair(8, "third.png")
    digests = {name: f"digest of {name}" for name in ("same.png", "other.png", "third.png")}
    draws = 0
    choice = random.Random.choice

    def counted(self: random.Random, seq: Any) -> Any:
        nonlocal draws
        draws += 1
        return choice(self, seq)

    monkeypatch.setattr(random.Random, "choice", counted)
    found = [each.image for each in choose_negatives(pairs, kind="other", digests=digests, seed=0)]
    # 1,500 per pair without a bound.
    assert draws < 110 * len(pairs)
    assert "same.png" not in found[:7] + found[9:]
    assert found[7] != "other.png"
    assert found[8] != "third.png"
    assert abs(found.count("other.png") - found.count("third.png")) < 300


def test_one_picture_under_two_names_is_no_other_image(data: Any) -> None:
    pairs, digests = pairs_with_digests(data)
    two = [pairs[0], replace(pairs[0], id="b", image="copy.png")]
    same = digests | {"copy.png": digests[pairs[0].image]}
    with pytest.raises(TitaError, match="2 pairs show the same image"):
        choose_negatives(two, kind="other", digests=same, seed=0)


def test_crops_and_noise_hide_the_image_and_keep_its_size(data: Any) -> None:
    pairs, digests = pairs_with_digests(data)
    image = open_image(data.images / pairs[0].image)
    for kind in ("crop", "noise"):
        first, second = choose_negatives(pairs[:2], kind=kind, digests=digests, seed=0)  # type: ignore[arg-type]
        changed = first.apply(image)
        assert changed.size == image.size
        assert changed.tobytes() != image.tobytes()
        assert changed.tobytes() == first.apply(image).tobytes()
        assert first.key != second.key


def test_a_page_shows_pairs_with_their_negative_images(data: Any, tmp_path: Path) -> None:
    pairs, digests = pairs_with_digests(data)
    different = next(pair.image for pair in pairs if digests[pair.image] != digests[pairs[0].image])
    rows = (replace(pairs[0], rejected_image=different), replace(pairs[0], id="2"))
    inputs = TrainInputs(
        model=LLAVA, model_name=LLAVA, image_aspect="pad", pairs=rows, pairs_path=data.pairs,
        answers=(), images=data.images,
        negatives=(Negative(image=different), Negative(image=rows[0].image, change="noise")),
    )  # fmt: skip
    write_contact_sheet(inputs, title="run", into=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    # The own image twice, and two negative ones.
    assert len(set(re.findall(r'base64,([^"]+)"', page))) == 3
    assert page.count("own image") >= 2
    assert "2 of 2 pairs" in page


def test_a_column_names_the_negative_image(data: Any) -> None:
    pairs, digests = pairs_with_digests(data)
    different = next(pair.image for pair in pairs if digests[pair.image] != digests[pairs[0].image])
    row = replace(pairs[0], rejected_image=different)
    assert choose_negatives([row], kind="rejected_image", digests=digests, seed=0) == (
        Negative(image=different),
    )
    with pytest.raises(TitaError, match="has no `rejected_image`"):
        choose_negatives([row, pairs[1]], kind="rejected_image", digests=digests, seed=0)
    itself = replace(pairs[0], rejected_image=pairs[0].image)
    with pytest.raises(TitaError, match="has its own image"):
        choose_negatives([itself], kind="rejected_image", digests=digests, seed=0)
