"""Held-out pairs: the split, leaks, figures, the best weights, and the warning about sight."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig

from tests.train.comparing import compute_uncached, largest_difference
from tests.train.test_image_preference import LLAVA, answer_log_prob
from tests.train.test_preflight import check, recipe_of
from tita.data import read_pairs
from tita.demo.models import demo_model_path
from tita.errors import TitaError
from tita.storage.manifest import sha256_of
from tita.train.best_weights import BestWeights
from tita.train.collators import PairCollator
from tita.train.history import evaluations, plot_curve, read_lines
from tita.train.model import save_model
from tita.train.negatives import choose_negatives
from tita.train.shared_images import encode_images_once
from tita.train.trainer import PairTrainer
from tita.train.training_data import make_dataset
from tita.train.validation import (
    check_leaks,
    read_logs,
    sight_warning,
    split_by_image,
    summarise,
    validation_logs,
)
from tita.vlm.loading import load_vlm

Start = Callable[..., Any]
MODEL = "runs/a/model"


def test_pictures_are_on_one_side_whatever_their_names(data: Any) -> None:
    pairs = list(read_pairs(data.pairs))
    digests = {pair.image: sha256_of(data.images / pair.image) for pair in pairs}
    # The same pictures under other names, with other questions.
    copies = [replace(p, id=f"{p.id}-copy", image=f"copy/{p.image}") for p in pairs]
    digests |= {f"copy/{name}": sha for name, sha in digests.items()}
    both = pairs + copies
    flags = split_by_image(both, share=0.2, digests=digests, seed=0)
    held = {digests[pair.image] for pair, flag in zip(both, flags, strict=True) if flag}
    trained = {digests[pair.image] for pair, flag in zip(both, flags, strict=True) if not flag}
    assert not held & trained
    assert 0.2 <= sum(flags) / len(both) < 0.3
    assert flags == split_by_image(both, share=0.2, digests=digests, seed=0)
    assert flags != split_by_image(both, share=0.2, digests=digests, seed=1)
    # At least two pictures, so that each pair has another one.
    few = split_by_image(pairs, share=0.001, digests=digests, seed=0)
    assert len({digests[p.image] for p, flag in zip(pairs, few, strict=True) if flag}) == 2
    one_picture = [pair for pair in pairs if pair.image == pairs[0].image]
    with pytest.raises(TitaError, match="needs pairs of three images or more, and there are 1"):
        split_by_image(one_picture, share=0.5, digests=digests, seed=0)


def test_a_leak_is_an_error_that_names_the_picture() -> None:
    digests = {"a.png": "1", "b.png": "2", "c.png": "3", "twin.png": "1"}
    check_leaks(["a.png"], ["b.png", "c.png"], digests=digests, where="v")
    with pytest.raises(TitaError, match=r"v: 1 of 2 images are also trained on, such as 'b.png'"):
        check_leaks(["a.png", "b.png"], ["b.png", "c.png"], digests=digests, where="v")
    with pytest.raises(TitaError, match=re.escape("such as 'twin.png', in training as 'a.png'")):
        check_leaks(["a.png"], ["twin.png", "c.png"], digests=digests, where="v")


def test_a_share_does_not_split_negative_images(data: Any, tmp_path: Path, lone_rank: None) -> None:
    rows = [json.loads(line) for line in data.pairs.read_text().splitlines()]
    names = sorted({row["image_id"] for row in rows})
    for row in rows:
        row["rejected_image"] = names[names.index(row["image_id"]) - 1]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    own = {"image_preference": {"negative": "rejected_image"}, "validation": 0.2}
    recipe = recipe_of(data, pairs=str(path), batch_size=4, **own)
    with pytest.raises(TitaError, match="they are the `rejected_image` of other pairs"):
        check(recipe, tmp_path)


def test_preflight_splits_and_refuses_a_planted_leak(
    data: Any, tmp_path: Path, lone_rank: None
) -> None:
    images = tmp_path / "images"
    shutil.copytree(data.images, images)
    rows = [json.loads(line) for line in data.pairs.read_text().splitlines()]
    names = sorted({row["image_id"] for row in rows})

    def write(name: str, some: list[dict[str, Any]]) -> str:
        path = tmp_path / name
        path.write_text("".join(f"{json.dumps(row)}\n" for row in some))
        return str(path)

    clean = [row for row in rows if row["image_id"] not in names[:3]]
    held = [row for row in rows if row["image_id"] in names[:3]]
    options = {"images": str(images), "pairs": write("train.jsonl", clean), "batch_size": 4}
    inputs = check(recipe_of(data, **options, validation=write("held.jsonl", held)), tmp_path)
    assert (len(inputs.pairs), len(inputs.validation)) == (len(clean), len(held))
    # The picture of a training pair under another name.
    shutil.copy(images / clean[0]["image_id"], images / "twin.png")
    twin = [*held, {**clean[0], "id": "twin", "image_id": "twin.png"}]
    leaked = recipe_of(data, **options, validation=write("leaked.jsonl", twin))
    with pytest.raises(TitaError, match=r"1 of 4 images are also trained on, such as 'twin.png'"):
        check(leaked, tmp_path)
    # By share, with the warm-up on the answers about the same pictures.
    warm = {"sft": {"steps": 1}, "validation": 0.2}
    inputs = check(recipe_of(data, **options | {"pairs": str(data.pairs)}, **warm), tmp_path)
    held_images = {inputs.image_digests[pair.image] for pair in inputs.validation}
    learned = {inputs.image_digests[pair.image] for pair in inputs.pairs}
    learned |= {inputs.image_digests[str(answer.image)] for answer in inputs.answers}
    assert not held_images & learned
    assert len(inputs.pairs) + len(inputs.validation) == len(rows)
    for pair, other in zip(inputs.validation, inputs.validation_others, strict=True):
        digest = inputs.image_digests[other.image]
        assert digest in held_images
        assert digest != inputs.image_digests[pair.image]


def test_figures_equal_those_by_hand() -> None:
    own = torch.tensor([1.0, 2.0, -1.0, 0.5])
    other = torch.tensor([-1.0, 1.0, -2.0, -0.5])
    found = summarise(own, other, pictures=list("abcd"), step=7)
    assert (found.step, found.accuracy, found.other_accuracy) == (7, 0.75, 0.25)
    assert (found.margin, found.image_effect) == (0.625, 0.5)
    expected = sum(math.log(1 + math.exp(-m)) for m in own.tolist()) / 4
    assert found.loss == pytest.approx(expected)
    # Agresti and Min: two pairs are right only under their own images, none only under others.
    yes, no, number = 2.5, 0.5, 6
    variance = (yes + no + 1 - 1 - (yes - no) ** 2 / number) / number**2
    assert variance > 0
    centre = (yes - no) / number
    half = (found.image_effect_high - found.image_effect_low) / 2
    assert centre == pytest.approx((found.image_effect_high + found.image_effect_low) / 2)
    # One more of each sign than in the four cells of 0.5 each: a little wider.
    assert half >= 1.96 * math.sqrt(variance)
    assert read_logs(validation_logs(found)) == found


def test_the_interval_counts_pictures_not_pairs() -> None:
    own = torch.tensor([1.0, 1.0, -1.0, -1.0] * 8)
    other = -torch.ones(32)
    apart = summarise(own, other, pictures=[str(n) for n in range(32)], step=1)
    together = summarise(own, other, pictures=[str(n % 4) for n in range(32)], step=1)
    assert together.image_effect == apart.image_effect == 0.5
    assert together.image_effect_low < apart.image_effect_low
    # Not even a perfect result has an interval of width 0.
    perfect = summarise(torch.ones(8), -torch.ones(8), pictures=list("abcdefgh"), step=1)
    assert perfect.image_effect_low < perfect.image_effect_high
    assert perfect.image_effect_low > 0


def test_a_model_that_does_not_look_is_named() -> None:
    names = [str(n) for n in range(40)]
    habit = summarise(torch.ones(40), torch.ones(40), pictures=names, step=1)
    warning = sight_warning(habit)
    assert warning is not None
    assert "prefers as well without seeing: 100% of the held-out pairs" in warning
    few = summarise(torch.ones(2), torch.tensor([1.0, -1.0]), pictures=["a", "b"], step=1)
    assert "too few pairs are held out to tell: 100% of" in str(sight_warning(few))
    sees = summarise(torch.ones(40), -torch.ones(40), pictures=names, step=1)
    assert sight_warning(sees) is None


def test_the_best_weights_are_kept_and_a_run_stops(tmp_path: Path, lone_rank: None) -> None:
    saved: list[int] = []
    state = SimpleNamespace(global_step=0, max_steps=100, is_world_process_zero=True)

    def follow(best: BestWeights, losses: list[float]) -> int | None:
        """The step at which it stops the run; None if it does not."""
        best.save = lambda folder: saved.append(state.global_step)
        best.on_train_begin(None, state, None)
        for loss in losses:
            state.global_step += 10
            control = SimpleNamespace(should_training_stop=False)
            figures = summarise(torch.ones(4), torch.ones(4), pictures=list("abcd"), step=0)
            logs = validation_logs(replace(figures, loss=loss))
            best.on_evaluate(None, state, control, metrics=logs)
            if control.should_training_stop:
                return int(state.global_step)
        return None

    first = BestWeights(tmp_path / "best", keep=True, patience=3)
    assert follow(first, [0.6, 0.4, 0.5]) is None
    assert (saved, first.step) == ([10, 20], 20)
    # A checkpoint that waits for its upload has a hard link.
    os.link(tmp_path / "best/state.json", tmp_path / "waiting.json")
    waiting = (tmp_path / "waiting.json").read_bytes()
    # A resumed run knows how many evaluations were worse.
    resumed = BestWeights(tmp_path / "best", keep=True, patience=3)
    assert follow(resumed, [0.5, 0.45]) == 50
    assert (saved, resumed.step) == ([10, 20], 20)
    assert resumed.kept == tmp_path / "best/weights"
    assert (tmp_path / "waiting.json").read_bytes() == waiting
    # A run that is interrupted when it has stopped does not go on.
    control = SimpleNamespace(should_training_stop=False)
    BestWeights(tmp_path / "best", keep=True, patience=3).on_train_begin(None, state, control)
    assert control.should_training_stop
    # Without `keep` nothing is saved.
    last = BestWeights(tmp_path / "last", keep=False, patience=None)
    assert follow(last, [0.6, 0.7, 0.8, 0.9]) is None
    assert (saved, last.kept, last.step) == ([10, 20], None, None)


def test_merging_the_best_adapter_changes_no_waiting_checkpoint(
    tmp_path: Path, lone_rank: None
) -> None:
    start, kept = str(demo_model_path("reward")), tmp_path / "best/weights"
    model = AutoModelForImageTextToText.from_pretrained(start)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    adapted.save_pretrained(str(kept))
    os.link(kept / "adapter_config.json", tmp_path / "waiting.json")
    waiting = (tmp_path / "waiting.json").read_bytes()
    trainer = SimpleNamespace(
        model=adapted,
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        is_world_process_zero=lambda: True,
    )
    save_model(trainer, start=start, into=tmp_path / "model", name="reward/start", kept=kept)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "reward/start"
    assert (tmp_path / "waiting.json").read_bytes() == waiting


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": 0}, "0 is not a share between 0 and 1"),
        ({"validation": 1.5}, "1.5 is not a share"),
        ({"keep": "best"}, "`keep=best` needs held-out pairs"),
        ({"early_stopping": 2}, "`early_stopping` needs held-out pairs"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_errors(
    data: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TitaError, match=re.escape(message)):
        recipe_of(data, **changes)


@pytest.mark.parametrize("ld_alpha", [None, 0.5])
def test_evaluations_change_nothing_and_equal_plain_torch(
    data: Any, tmp_path: Path, ld_alpha: float | None
) -> None:
    processor = AutoProcessor.from_pretrained(LLAVA)
    pairs = list(read_pairs(data.pairs))
    digests = {pair.image: sha256_of(data.images / pair.image) for pair in pairs}
    # Answers of different lengths, for `ld_alpha`; five pairs, for a partial last batch.
    held = [replace(p, chosen=f"{p.chosen} and red") for p in pairs[20:25]]
    others = choose_negatives(held, kind="other", digests=digests, seed=0)
    options: dict[str, Any] = {
        "images": data.images, "processor": processor, "image_aspect": "pad",
    }  # fmt: skip

    def train(**held_out: Any) -> Any:
        model = load_vlm(LLAVA, dtype="float32").model
        config = DPOConfig(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4,
            per_device_eval_batch_size=3, learning_rate=1e-2, max_length=None, bf16=False,
            use_cpu=True, report_to="none", save_strategy="no", remove_unused_columns=False,
            precompute_ref_log_probs=True, ld_alpha=ld_alpha, eval_steps=1,
            eval_strategy="steps" if held_out else "no", lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = PairTrainer(
            recall=compute_uncached,
            model=model,
            args=config,
            train_dataset=make_dataset(pairs[:12], **options),
            data_collator=PairCollator(processor, model.config.image_token_id),
            processing_class=processor,
            shared_images=encode_images_once(model),
            **held_out,
        )
        trainer.train()
        return trainer

    rows = make_dataset(held, **options, negatives=others, held_out=True)
    pictures = [digests[pair.image] for pair in held]
    plain, evaluated = train(), train(eval_dataset=rows, pictures=pictures)
    state = plain.model.state_dict()
    # The tower of a training batch must not read the layout of an evaluation.
    assert all(torch.equal(state[n], value) for n, value in evaluated.model.state_dict().items())
    found = [read_logs(line) for line in evaluated.state.log_history if "eval_loss" in line]
    assert [figures.step for figures in found if figures] == [1, 2, 3]
    if ld_alpha is not None:
        return
    start = load_vlm(LLAVA, dtype="float32").model
    trained = load_vlm(LLAVA, dtype="float32").model
    trained.load_state_dict(state)

    def margin(row: Any, shown: str) -> float:
        with torch.no_grad():
            chosen, rejected = (
                answer_log_prob(trained, processor, row, answer, shown)
                - answer_log_prob(start, processor, row, answer, shown)
                for answer in ("chosen", "rejected")
            )
        return 0.1 * float(chosen - rejected)

    own, other = (
        torch.tensor([margin(rows[n], shown) for n in range(5)])
        for shown in ("pictures", "other_pictures")
    )
    expected = asdict(summarise(own, other, pictures=pictures, step=3))
    assert found[-1] is not None
    assert asdict(found[-1]) == pytest.approx(expected, abs=1e-5)


# Runs in real processes


@pytest.fixture(scope="module")
def habit(data: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Pairs whose better answer is always `yes`, learned so fast that later steps are worse."""
    path = tmp_path_factory.mktemp("habit") / "pairs.jsonl"
    rows = [json.loads(line) for line in data.pairs.read_text().splitlines()]
    wrong = {"chosen": "yes", "reject": "no"}
    path.write_text("".join(f"{json.dumps({**row, **wrong})}\n" for row in rows))
    return {"pairs": str(path), "validation": 0.3, "eval_steps": 1, "keep": "best"}


@pytest.mark.slow
@pytest.mark.soak
def test_a_run_that_learned_a_habit_ends_with_a_warning(
    start: Start, habit: dict[str, Any], tmp_path: Path
) -> None:
    ended = start(tmp_path, **habit).finish()
    assert ended.code == 0, ended.text
    assert "warning: the reward model prefers as well without seeing" in ended.text
    facts = json.loads((tmp_path / "runs/a/run.json").read_text())
    assert "prefers as well without seeing" in facts["warnings"][0]
    assert facts["validation"]["accuracy"] == facts["validation"]["other_accuracy"]


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8, "dropout": 0.0}], ids=str)
def test_held_out_pairs_change_nothing_and_the_best_weights_are_those_of_their_step(
    start: Start, data: Any, tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    def swapped(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"chosen": row["reject"], "reject": row["chosen"]}

    rows = [json.loads(line) for line in data.pairs.read_text().splitlines()]
    names = sorted({row["image_id"] for row in rows})[:4]
    paths = {}
    for name, some in (
        ("train", [row for row in rows if row["image_id"] not in names]),
        # The opposite preference, so that every step makes their loss larger.
        ("held", [swapped(row) for row in rows if row["image_id"] in names]),
    ):
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text("".join(f"{json.dumps(row)}\n" for row in some))
    shared: dict[str, Any] = {
        "pairs": str(paths["train"]), "schedule": "constant", "warmup_ratio": 0.0,
        "learning_rate": 3e-2 if lora else 1e-2, "beta": 1.0,
    }  # fmt: skip
    shared |= {"lora": lora} if lora else {}
    held = {"validation": str(paths["held"]), "eval_steps": 1}
    plain = start(tmp_path / "plain", **shared).finish()
    last = start(tmp_path / "last", **shared, **held).finish()
    best = start(tmp_path / "best", **shared, **held, keep="best").finish()
    assert [plain.code, last.code, best.code] == [0, 0, 0], plain.text + last.text + best.text
    assert largest_difference(tmp_path / "plain" / MODEL, tmp_path / "last" / MODEL) <= 1e-6
    found = evaluations(read_lines(tmp_path / "best/runs/a/train.jsonl"))
    least = min(found, key=lambda figures: figures.loss)
    assert least.step < found[-1].step, "the last step is the best one: nothing is shown"
    facts = json.loads((tmp_path / "best/runs/a/run.json").read_text())
    assert (facts["validation"]["step"], facts["validation"]["loss"]) == (least.step, least.loss)
    # The same training, ended at that step.
    short = start(tmp_path / "short", **shared, max_steps=least.step).finish()
    assert short.code == 0, short.text
    assert largest_difference(tmp_path / "short" / MODEL, tmp_path / "best" / MODEL) <= 1e-6
    assert not (tmp_path / "best/runs/a/best").exists()
    lines = read_lines(tmp_path / "best/runs/a/train.jsonl")
    drawn = plot_curve(lines, "reward_accuracy")
    assert ">training<" in drawn
    assert ">held out<" in drawn
    assert ">held out, other images<" in drawn
