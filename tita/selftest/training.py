"""Checks of training: `train-dpo` as in a pod, beside DPO in plain torch on the CPU.

Every step's batch is all pairs, so that their order does not matter; the learning rate is constant.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from tita.data import write_pairs
from tita.launch.local import run_node_processes
from tita.records import Pair, TrainProgress, read_progress
from tita.selftest.checks import Check, CheckFailed, Figures
from tita.selftest.random_llava import Size, random_image, random_llava, save_vlm
from tita.storage import open_store
from tita.vlm.loading import load_vlm

BETA, LEARNING_RATE = 0.1, 1e-3
BATCH, ACCUMULATION, STEPS = 2, 2, 4
TOLERANCES = {"float32": 0.002, "bfloat16": 0.05}
"""Of loss and margin after a step, relative to the margin, by dtype. Adam's first update is the
sign of the gradient: where that is near 0, rounding decides, and in 16 bits so it does often."""


@dataclass(frozen=True)
class Workshop:
    """A random reward model, pairs, and a store, in one folder."""

    folder: Path
    size: Size
    num_processes: int

    @property
    def store(self) -> str:
        return str(self.folder / "store")

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @cached_property
    def pairs(self) -> list[Pair]:
        """Writes the model, the pairs and their images; every process gets the same number."""
        save_vlm(random_llava("reward", self.size, seed=3), self.model)
        pairs = []
        for number in range(BATCH * ACCUMULATION * self.num_processes):
            name = f"{number}.png"
            random_image(number, side=self.size.image_side).save(self.folder / name)
            # Answers of different lengths, so that padding is there.
            chosen, rejected = (
                " ".join(f"w{(number * step + place) % 100}" for place in range(1 + number % 3))
                for step in (7, 11)
            )
            pair = Pair(
                id=str(number), image=name, question=f"w{number} w{number + 1}",
                chosen=chosen, rejected=f"{rejected} w99",
            )  # fmt: skip
            pairs.append(pair)
        (self.folder / "pairs.jsonl").write_bytes(write_pairs(pairs))
        return pairs

    def train(
        self, run: str, *, on_line: Callable[[str], None] | None = None, **recipe: Any
    ) -> int:
        """Run `train-dpo` in processes of its own; returns the exit code."""
        assert self.pairs
        values = {
            "model": str(self.model), "pairs": str(self.folder / "pairs.jsonl"),
            "images": str(self.folder), "beta": BETA, "learning_rate": LEARNING_RATE,
            "schedule": "constant", "warmup_ratio": 0.0, "epochs": float(STEPS),
            "batch_size": BATCH, "gradient_accumulation": ACCUMULATION, "logging_steps": 1,
            "dtype": "float32", "gradient_checkpointing": False,
        }  # fmt: skip
        lines: list[str] = []

        def hear(_: int, line: str) -> None:
            lines.append(line)
            if on_line is not None:
                on_line(line)

        with _outside_a_pod():
            code = run_node_processes(
                "train-dpo", recipe=values | recipe, run=run, store=self.store,
                procs_per_node=self.num_processes, on_line=hear, grace_s=20,
            )  # fmt: skip
        if code and on_line is None:
            said = [line for line in lines if line.startswith("train-dpo:")] or lines
            raise CheckFailed(f"train-dpo ended with {code}: {(said or [''])[-1]}")
        return code

    def trained(self, run: str) -> Path:
        """The folder of a complete run."""
        return open_store(self.store).pull_tree(f"runs/{run}")

    def progress(self, run: str) -> list[TrainProgress]:
        """What the run logged, by step."""
        lines = (self.trained(run) / "train.jsonl").read_text().splitlines()
        return [found for line in lines if (found := read_progress(line))]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainStep:
    """A step of DPO in plain torch, before its update."""

    loss: float
    margin: float


def plain_dpo(model: Any, processor: Any, pairs: Sequence[tuple[Pair, Any]]) -> list[PlainStep]:
    """DPO (arXiv 2305.18290, equation 7) by its definition: one pair at a time, AdamW.

    Args:
        model: in float32 on the CPU; it is trained in place, its vision tower excepted.
        pairs: each with its open image.
    """
    model.eval()
    trained = [p for name, p in model.named_parameters() if "vision_tower" not in name]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    with torch.no_grad():
        reference = [_log_ratio(model, processor, *each).item() for each in pairs]
    steps = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses, margins = [], []
        for each, before in zip(pairs, reference, strict=True):
            margin = BETA * (_log_ratio(model, processor, *each) - before)
            loss = -torch.nn.functional.logsigmoid(margin)
            torch.autograd.backward(loss / len(pairs))
            losses.append(loss.item())
            margins.append(margin.item())
        steps.append(PlainStep(loss=sum(losses) / len(pairs), margin=sum(margins) / len(pairs)))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return steps


def _log_ratio(model: Any, processor: Any, pair: Pair, image: Any) -> Tensor:
    """log p(chosen) - log p(rejected)."""
    chosen, rejected = (
        _log_prob(model, processor, pair.question, image, answer)
        for answer in (pair.chosen, pair.rejected)
    )
    return chosen - rejected


def _log_prob(model: Any, processor: Any, question: str, image: Any, answer: str) -> Tensor:
    """log p of the answer and its end, by the template of the whole conversation."""
    asked = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": question}],
    }
    answered = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    whole, prompt = (
        processor(
            text=[processor.apply_chat_template(turns, add_generation_prompt=open_turn)],
            images=[image], return_tensors="pt", add_special_tokens=False,
        )
        for turns, open_turn in (([asked, answered], False), ([asked], True))
    )  # fmt: skip
    begin = prompt["input_ids"].shape[1]
    ids = whole["input_ids"]
    logits = model(input_ids=ids, pixel_values=whole["pixel_values"], use_cache=False).logits
    table = torch.log_softmax(logits[0, begin - 1 : -1].float(), -1)
    return table.gather(-1, ids[0, begin:, None]).sum()


@contextmanager
def _outside_a_pod() -> Iterator[None]:
    """Remove the variables by which a process would take itself for this pod's own run."""
    names = ("LAUNCH_UID", "NAMESPACE", "NODE_RANK", "NUM_NODES", "TERMINATION_LOG", "TRIES")
    removed = {
        name: value
        for name in (f"TITA_{each}" for each in names)
        if (value := os.environ.pop(name, None)) is not None
    }
    try:
        yield
    finally:
        os.environ.update(removed)


def checks_of_training(work: Workshop, *, dtypes: Sequence[str], short: bool) -> list[Check]:
    """The checks, most important first.

    Args:
        dtypes: of the runs that are compared with plain torch.
        short: one ZeRO stage alone.
    """
    stages = ("zero2",) if short else ("zero2", "zero3", "zero3_offload")
    comparing = [
        Check(
            name=f"train-{stage}-{dtype}",
            group="right",
            about=f"losses and margins of train-dpo under {stage} in {dtype} equal DPO in plain "
            "torch",
            run=partial(_check_losses, work, stage, dtype),
            expected_s=30,
        )
        for dtype in dtypes
        for stage in stages
    ]
    resuming = Check(
        name="resume",
        group="right",
        about="a run whose worker is killed resumes from its checkpoint and ends with the weights "
        "of an undisturbed one",
        run=partial(_check_resume, work),
        expected_s=60,
    )
    lora = Check(
        name="train-lora",
        group="right",
        about="train-dpo with LoRA lowers the loss",
        run=partial(_check_lora, work, dtypes[-1]),
        expected_s=30,
    )
    return [comparing[0], *(() if short else (resuming, *comparing[1:], lora))]


def _check_losses(work: Workshop, stage: str, dtype: str) -> Figures:
    run = f"{stage}-{dtype}".replace("_", "-")
    work.train(run, deepspeed=stage, dtype=dtype)
    got = work.progress(run)
    if len(got) != STEPS:
        raise CheckFailed(f"{len(got)} of {STEPS} steps were logged")
    vlm = load_vlm(work.model, dtype="float32", device_map="cpu")
    if dtype != "float32":
        vlm = replace(vlm, model=vlm.model.to(getattr(torch, dtype)).float())
    pairs = [(pair, random_image(int(pair.id), side=work.size.image_side)) for pair in work.pairs]
    wanted = plain_dpo(vlm.model, vlm.processor, pairs)
    figures: dict[str, float] = {}
    for step, (one, other) in enumerate(zip(got, wanted, strict=True), start=1):
        bound = 1e-4 + TOLERANCES[dtype] * max(abs(other.margin), BETA)
        for name, is_, should in (
            ("loss", one.loss, other.loss),
            ("margin", one.reward_margin, other.margin),
        ):
            figures[f"step_{step}_{name}"] = is_
            figures[f"step_{step}_{name}_plain"] = should
            if not abs(is_ - should) <= bound:
                raise CheckFailed(
                    f"{name} of step {step} is {is_:.4f}, in plain torch {should:.4f}, "
                    f"tolerance {bound:.4f}"
                )
    return figures


def _check_resume(work: Workshop) -> Figures:
    # Under ZeRO-2 in float32; a checkpoint after each step.
    whole = "zero2-float32"
    if not open_store(work.store).exists(f"runs/{whole}/manifest.json"):
        work.train(whole, deepspeed="zero2")
    killed: list[psutil.Process] = []

    def kill(line: str) -> None:
        found = read_progress(line)
        if found and found.step == STEPS - 1 and not killed:
            killed.extend(_workers_of_this_process()[:1])
            for worker in killed:
                worker.kill()

    code = work.train("killed", on_line=kill, save_steps=1)
    if not killed:
        raise CheckFailed(f"no worker was there to be killed; train-dpo ended with {code}")
    resumed: list[str] = []
    code = work.train("killed", on_line=resumed.append, save_steps=1)
    if code:
        raise CheckFailed(f"the resumed run ended with {code}: {(resumed or [''])[-1]}")
    difference = _largest_difference(work.trained(whole), work.trained("killed"))
    if difference > 1e-6:
        raise CheckFailed(f"weights of the resumed run differ by {difference:.2g}")
    return {
        "largest_difference": difference,
        "resumed_from_a_checkpoint": any("resuming from step" in line for line in resumed),
    }


def _check_lora(work: Workshop, dtype: str) -> Figures:
    work.train("lora", lora={"rank": 4, "alpha": 8, "dropout": 0.0}, dtype=dtype)
    first, *_, last = work.progress("lora")
    if not abs(first.loss - math.log(2)) < 1e-3:
        raise CheckFailed(f"the first loss is {first.loss:.4f}, not log 2")
    if not last.loss < first.loss:
        raise CheckFailed(f"the loss went from {first.loss:.4f} to {last.loss:.4f}")
    return {"first_loss": first.loss, "last_loss": last.loss}


def _workers_of_this_process() -> list[psutil.Process]:
    """The training workers below this process."""
    worker = ["-m", "tita.gang.worker", "tita.train"]
    found = []
    for each in psutil.Process().children(recursive=True):
        # One may end meanwhile.
        with suppress(psutil.Error):
            if each.cmdline()[-len(worker) :] == worker:
                found.append(each)
    return found


def _largest_difference(one: Path, other: Path) -> float:
    states: list[Mapping[str, Tensor]] = [
        load_vlm(run / "model", dtype="float32", device_map="cpu").model.state_dict()
        for run in (one, other)
    ]
    left, right = states
    return max(float((left[name] - right[name]).abs().max()) for name in left)
