"""Steps per second of `train-dpo`'s trainer beside plain TRL, same data, model and process.

One process without DeepSpeed, float32, no gradient checkpointing; the vision tower trains. The two
trainers take turns, so that whatever else this machine does meets both. Reference log-probabilities
are at hand for ours, as in every run after the first; plain TRL runs its reference model each step.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer

from tita.demo.models import demo_model_path
from tita.demo.scenes import make_scenes, write_scenes
from tita.records import Pair
from tita.train.collate import PairCollator
from tita.train.dataset import make_dataset
from tita.train.trainer import PairTrainer, encode_images_once
from tita.vlm import hush_transformers

STEPS, ROUNDS, BATCH = 20, 5, 8


def pairs_of(root: Path) -> list[Pair]:
    questions = write_scenes(root, make_scenes("train", number=60), name="train")
    return [
        Pair(
            id=question.id,
            image=str(question.image),
            question=question.text,
            chosen=question.references[0],
            rejected="yes" if question.references[0] == "no" else "no",
        )
        for question in questions
    ]


def config(folder: Path) -> DPOConfig:
    return DPOConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-4,
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        activation_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=STEPS,
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def plain(dataset: Any, *, processor: Any, folder: Path) -> Any:
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
    dataset = dataset.with_format(None).with_transform(
        lambda batch, inner=dataset.format["format_kwargs"]["transform"]: renamed(inner(batch))
    )
    return DPOTrainer(
        model=model, args=config(folder), train_dataset=dataset, processing_class=processor
    )


def renamed(rows: dict[str, Any]) -> dict[str, Any]:
    return {("images" if name == "pictures" else name): column for name, column in rows.items()}


def ours(dataset: Any, *, processor: Any, folder: Path, known: list[Any]) -> Any:
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
    encode_images_once(model)
    args = config(folder)
    args.precompute_ref_log_probs = True

    def recall(compute: Any) -> Any:
        if not known:
            known.append(compute())
        return known[0]

    return PairTrainer(
        recall=recall,
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=PairCollator(processor),
        processing_class=processor,
    )


def seconds_a_step(trainer: Any) -> tuple[float, float, float]:
    """Wall time, CPU time (which other processes disturb less), and the mean loss."""
    began, cpu = time.perf_counter(), time.process_time()
    loss = trainer.train().training_loss
    taken = time.perf_counter() - began, time.process_time() - cpu
    return taken[0] / STEPS, taken[1] / STEPS, loss


def main() -> None:
    hush_transformers()
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(MODEL)
    times: dict[str, list[float]] = {"trl": [], "tita": []}
    cpu_times: dict[str, list[float]] = {"trl": [], "tita": []}
    losses: dict[str, float] = {}
    known: list[Any] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        pairs = pairs_of(root / "images")
        for _ in range(ROUNDS):
            rows = make_dataset(
                pairs, images=root / "images", processor=processor, image_aspect="pad"
            )
            both = {
                "trl": plain(rows, processor=processor, folder=root / "out"),
                "tita": ours(rows, processor=processor, folder=root / "out", known=known),
            }
            for who, trainer in both.items():
                taken, burnt, losses[who] = seconds_a_step(trainer)
                times[who].append(taken)
                cpu_times[who].append(burnt)
    steps = {who: 1 / statistics.median(taken) for who, taken in times.items()}
    cpu = {who: statistics.median(taken) for who, taken in cpu_times.items()}
    print(
        json.dumps(
            {
                "steps_per_s": {who: round(value, 2) for who, value in steps.items()},
                "ratio": round(steps["tita"] / steps["trl"], 2),
                "cpu_time_ratio": round(cpu["trl"] / cpu["tita"], 2),
                "mean_loss": losses,
                "rounds": {who: [round(1 / t, 2) for t in taken] for who, taken in times.items()},
                "batch": BATCH,
                "steps": STEPS,
            }
        )
    )


MODEL = str(demo_model_path("reward"))

if __name__ == "__main__":
    main()
