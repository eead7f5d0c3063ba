"""Steps per second of `train-dpo`'s trainer compared with plain TRL, and the cost of uploads.

One process without DeepSpeed, float32, no gradient checkpointing; the vision tower is trained. All
trainers get the same pairs in the same order and take turns, so that other load on the machine
affects all of them; ratios are medians over the rounds. Plain TRL runs its reference model in each
step. Ours has the reference log-probabilities cached, as every run but the first. It is measured
with each image encoded twice, as in TRL, and with it encoded once. The losses must agree.

Image preference is measured beside the latter, with the images of other pairs as negatives: three
sequences per pair instead of two, and two images instead of one, which are opened and processed in
the step. The result depends on CPU time, of one thread.

Uploads: one training saves checkpoints every few steps, and alternately uploads them to a store (a
directory) in the other thread or drops them. Both write the same local copy, four times as often
as by default. The wall time of neighbouring intervals is compared, but on a busy machine it
scatters by more than the bound, as the quartiles show. So the result depends on the upload's own
CPU time relative to its interval: sharing a core and Python's lock with the training loop, it
cannot slow it down by more than that.
"""

import json
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import DPOConfig, DPOTrainer

from tita.demo.models import demo_model_path
from tita.demo.scenes import make_scenes, write_scenes
from tita.recipes import ImagePreferenceRecipe
from tita.records import Pair
from tita.storage import open_store
from tita.storage.manifest import sha256_of
from tita.train.checkpoints import Checkpoints
from tita.train.collators import PairCollator
from tita.train.negatives import Negative, choose_negatives
from tita.train.reference import Compute, LogProbs
from tita.train.run import CHECKPOINTING
from tita.train.shared_images import encode_images_once
from tita.train.trainer import PairTrainer, remove_printers
from tita.train.training_data import make_dataset
from tita.vlm.loading import silence_transformers

MODEL = str(demo_model_path("reward"))
STEPS, ROUNDS, BATCH = 20, 5, 8
SAVES, SAVE_EVERY = 25, 50
LEAST_RATIO, MOST_UPLOAD_COST, MOST_IMAGE_COST = 1.25, 0.03, 1.6


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds per step: wall time, and CPU time of this thread."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter(), time.thread_time()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.wall = (time.perf_counter() - self._began[0]) / args.max_steps
        self.cpu = (time.thread_time() - self._began[1]) / args.max_steps


class EveryOther(Checkpoints):
    """Checkpoints of which every other one is not uploaded."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.uploads: list[bool] = []
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self._began = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % SAVE_EVERY == 0:
            now = time.perf_counter()
            if self._began:
                self.seconds.append(now - self._began)
            self._began = now

    def _push(self, step: int, folder: Path) -> None:
        self.uploads.append(step // SAVE_EVERY % 2 == 1)
        if self.uploads[-1]:
            began = time.thread_time()
            super()._push(step, folder)
            self.cpu.append(time.thread_time() - began)

    def cpu_share(self) -> float:
        """CPU time of the median upload relative to the median interval."""
        return statistics.median(self.cpu) / statistics.median(self.seconds)

    def ratios(self) -> list[float]:
        """Seconds of each interval with an upload relative to the next one without."""
        assert self.uploads == [number % 2 == 0 for number in range(SAVES)], "an upload was late"
        taken = self.seconds
        return [taken[i] / taken[i + 1] for i in range(0, len(taken) - 1, 2)]


class Bench:
    """The pairs, and trainers for them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.processor = AutoProcessor.from_pretrained(MODEL)
        self.pairs = _pairs(root / "images")
        digests = {pair.image: sha256_of(root / "images" / pair.image) for pair in self.pairs}
        self.negatives = choose_negatives(self.pairs, kind="other", digests=digests, seed=0)
        self._known: dict[bool, LogProbs] = {}

    def plain(self) -> Any:
        """Plain TRL."""
        rows = self._rows()
        rename = rows.format["format_kwargs"]["transform"]
        dataset = rows.with_format(None).with_transform(lambda batch: _renamed(rename(batch)))
        return DPOTrainer(
            model=self._model(),
            args=self._config(steps=STEPS),
            train_dataset=dataset,
            processing_class=self.processor,
        )

    def ours(
        self,
        *,
        once: bool,
        sees: bool = False,
        steps: int = STEPS,
        save_every: int = 0,
        **options: Any,
    ) -> Any:
        """Ours; with `once` the vision tower encodes each image once, with `sees` image terms."""
        model = self._model()
        return PairTrainer(
            recall=lambda compute, _: self._recall(compute, sees),
            model=model,
            args=self._config(steps=steps, save_every=save_every, precompute_ref_log_probs=True),
            train_dataset=self._rows(self.negatives if sees else ()),
            data_collator=PairCollator(self.processor, model.config.image_token_id),
            processing_class=self.processor,
            shared_images=encode_images_once(model) if once else None,
            image_preference=ImagePreferenceRecipe() if sees else None,
            **options,
        )

    def uploading(self) -> EveryOther:
        """One training with checkpoints, of which every other one is uploaded."""
        store = open_store(str(Path(tempfile.mkdtemp(dir=self.root))))
        checkpoints = EveryOther(
            store=store, out="run", node=0, num_nodes=1, meta={}, is_same_run=lambda _: True
        )
        steps = SAVES * SAVE_EVERY
        trainer = self.ours(once=True, steps=steps, save_every=SAVE_EVERY, callbacks=[checkpoints])
        remove_printers(trainer)
        trainer.train()
        checkpoints.finish()
        return checkpoints

    def _rows(self, negatives: Sequence[Negative] = ()) -> Any:
        return make_dataset(
            self.pairs,
            images=self.root / "images",
            processor=self.processor,
            image_aspect="pad",
            negatives=negatives,
        )

    def _model(self) -> Any:
        return AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)

    def _recall(self, compute: Compute, sees: bool) -> LogProbs:
        if sees not in self._known:
            found = [array("f") for _ in range(3 if sees else 2)]

            def add(batch: Sequence[Sequence[float]]) -> None:
                for part, values in zip(found, batch, strict=True):
                    part.extend(values)

            compute(0, add)
            self._known[sees] = [np.array(part) for part in found]
        return self._known[sees]

    def _config(self, *, steps: int, save_every: int = 0, **options: Any) -> DPOConfig:
        return DPOConfig(
            output_dir=tempfile.mkdtemp(dir=self.root),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-4,
            max_length=None,
            bf16=False,
            **{CHECKPOINTING: False},
            use_cpu=True,
            report_to="none",
            save_strategy="steps" if save_every else "no",
            save_steps=save_every or 500,
            logging_steps=steps,
            disable_tqdm=True,
            remove_unused_columns=False,
            **options,
        )


def _pairs(root: Path) -> list[Pair]:
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


def _renamed(rows: dict[str, Any]) -> dict[str, Any]:
    return {("images" if name == "pictures" else name): column for name, column in rows.items()}


def measure(
    makers: dict[str, Callable[[], Any]], *, rounds: int
) -> tuple[dict[str, list[Clock]], dict[str, float]]:
    """A clock for every round of every trainer, and the losses; the first round is a warm-up."""
    clocks: dict[str, list[Clock]] = {who: [] for who in makers}
    losses = {}
    for number in range(rounds + 1):
        order = list(makers) if number % 2 else list(reversed(makers))
        for who in order:
            trainer = makers[who]()
            remove_printers(trainer)
            clock = Clock()
            trainer.add_callback(clock)
            losses[who] = trainer.train().training_loss
            if number:
                clocks[who].append(clock)
    return clocks, losses


def ratio(times: dict[str, list[Clock]], over: str, under: str, *, by: str = "wall") -> float:
    """Median over the rounds of the ratio of seconds per step."""
    pairs = zip(times[over], times[under], strict=True)
    found: list[float] = [getattr(one, by) / getattr(other, by) for one, other in pairs]
    return statistics.median(found)


def main() -> int:
    silence_transformers()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        group = f"file://{root}/group"
        dist.init_process_group("gloo", init_method=group, rank=0, world_size=1)
        bench = Bench(root)
        times, losses = measure(
            {
                "trl": bench.plain,
                "cached": lambda: bench.ours(once=False),
                "cached_once": lambda: bench.ours(once=True),
                "image_preference": lambda: bench.ours(once=True, sees=True),
            },
            rounds=ROUNDS,
        )
        saved = bench.uploading()
        dist.destroy_process_group()
    cached, once = ratio(times, "trl", "cached"), ratio(times, "trl", "cached_once")
    by_cpu = [round(ratio(times, "trl", who, by="cpu"), 3) for who in ("cached", "cached_once")]
    quartiles = [round(q - 1, 4) for q in statistics.quantiles(saved.ratios(), n=4)]
    image_cost = ratio(times, "image_preference", "cached_once", by="cpu")
    same = [loss for who, loss in losses.items() if who != "image_preference"]
    agree = max(same) - min(same) < 1e-3
    passed = {
        "cached_reference": cached >= LEAST_RATIO,
        # The tiny tower is a small part of a step, so wall time may not show the difference.
        "images_once_too": by_cpu[1] > by_cpu[0],
        "image_preference": image_cost <= MOST_IMAGE_COST,
        "uploads": saved.cpu_share() < MOST_UPLOAD_COST,
        "same_losses": agree,
    }
    results = {
        "steps_per_s": {
            who: round(1 / statistics.median(c.wall for c in some), 2)
            for who, some in times.items()
        },
        "ratio_cached_reference": round(cached, 2),
        "ratio_images_once_too": round(once, 2),
        "ratios_by_cpu_time": by_cpu,
        "bound": LEAST_RATIO,
        "image_preference_cost_by_cpu_time": round(image_cost, 2),
        "image_preference_cost": round(ratio(times, "image_preference", "cached_once"), 2),
        "image_preference_bound": MOST_IMAGE_COST,
        "upload_cpu_share": round(saved.cpu_share(), 4),
        "upload_wall_cost_quartiles": quartiles,
        "upload_bound": MOST_UPLOAD_COST,
        "mean_loss": losses,
        "passed": passed,
    }
    print(json.dumps(results, indent=1))
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
