"""Trains the two models of the package from scratch on the CPU, in minutes: `make demo-models`.

The vision tower first learns to classify digit and ink of every quarter; then the whole model
learns to answer the questions of biased annotators (see `scenes`). Base and reward model differ in
size and number of steps. Neither sees a scan of the train, validation or test split.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tita.demo.models import WEIGHTS_FOLDER
from tita.demo.scenes import INKS, AnnotatorBias, Scene, make_scenes
from tita.demo.tiny_llava import BASE, REWARD, TinyConfig, make_model, make_processor
from tita.terminal import progress, say
from tita.vlm.loading import silence_transformers
from tita.vlm.prompts import Prompt, prompt_text

BIAS = AnnotatorBias(ink=0.45, yes=0.15, lost=0.06)
NUM_SCENES = 12_000
IGNORED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainConfig:
    """Hyperparameters of one model."""

    role: str
    size: TinyConfig
    vision_steps: int
    answer_steps: int
    seed: int
    vision_batch: int = 128
    answer_batch: int = 32
    learning_rate: float = 2e-3


MODELS = (
    PretrainConfig(role="base", size=BASE, vision_steps=200, answer_steps=600, seed=0),
    PretrainConfig(role="reward", size=REWARD, vision_steps=500, answer_steps=700, seed=1),
)


def pixel_values(scenes: Sequence[Scene]) -> Tensor:
    """Return pixels[N, 3, 32, 32] in -1..1, equal to the processor's output."""
    pixels = np.stack([scene.pixels for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous() * 2 - 1


def train_vision(tower: Any, scenes: Sequence[Scene], *, config: PretrainConfig) -> None:
    """Train a CLIP tower to classify digit and ink of every quarter from its token."""
    pixels, labels = pixel_values(scenes), torch.from_numpy(_quarters(scenes))
    width = config.size.width
    digits, inks = nn.Linear(width, 11), nn.Linear(width, len(INKS) + 1)
    weights = [*tower.parameters(), *digits.parameters(), *inks.parameters()]
    for rows in _steps("vision", weights, scenes, config.vision_steps, config.vision_batch, config):
        # [N, 4, width]: without CLIP's class token.
        hidden = tower(pixels[rows]).last_hidden_state[:, 1:]
        wanted = labels[rows]
        loss = F.cross_entropy(digits(hidden).flatten(0, 1), wanted[..., 0].flatten())
        loss = loss + F.cross_entropy(inks(hidden).flatten(0, 1), wanted[..., 1].flatten())
        loss.backward()  # type: ignore[no-untyped-call]


def train_answers(
    model: Any, scenes: Sequence[Scene], *, processor: Any, config: PretrainConfig
) -> None:
    """Train the whole model with cross-entropy on the tokens of the answers."""
    pixels = pixel_values(scenes)
    texts = [_tokens(scene, processor=processor) for scene in scenes]
    weights = list(model.parameters())
    for rows in _steps(
        "answers", weights, scenes, config.answer_steps, config.answer_batch, config
    ):
        several = [(int(row), text) for row in rows for text in texts[row]]
        inputs, labels = _pad([text for _, text in several], pad=processor.tokenizer.pad_token_id)
        model(
            input_ids=inputs,
            attention_mask=(inputs != processor.tokenizer.pad_token_id).long(),
            pixel_values=pixels[[row for row, _ in several]],
            labels=labels,
        ).loss.backward()


def _steps(
    phase: str,
    weights: list[nn.Parameter],
    scenes: Sequence[Scene],
    num_steps: int,
    batch_size: int,
    config: PretrainConfig,
) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of each step; then apply the caller's gradients (AdamW, cosine decay)."""
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0.01)
    warmup = num_steps // 8
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1 + np.cos(np.pi * step / num_steps)),
    )
    generator = np.random.default_rng(config.seed)
    with progress(f"{config.role}: {phase}", total=num_steps, unit="steps") as advance:
        for _ in range(num_steps):
            yield generator.integers(0, len(scenes), batch_size)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            advance()


def _quarters(scenes: Sequence[Scene]) -> NDArray[np.int64]:
    """Labels[N, 4, 2]: digit (10: none) and ink (4: none) of every quarter."""
    labels = np.full((len(scenes), 4, 2), (10, len(INKS)), np.int64)
    for row, scene in enumerate(scenes):
        for digit in scene.digits:
            labels[row, digit.quarter] = (digit.value, list(INKS).index(digit.ink))
    return labels


def _tokens(scene: Scene, *, processor: Any) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompt and answer (with end-of-text) of each question."""
    tokenizer = processor.tokenizer
    image = tokenizer.convert_tokens_to_ids("<image>")
    count = processor.image_processor.size["shortest_edge"] // processor.patch_size
    pairs = []
    for question in scene.questions:
        text = prompt_text(processor, Prompt(text=question.text, images=(None,)))  # type: ignore[arg-type]
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        at = prompt.index(image)
        prompt[at : at + 1] = [image] * count**2
        answer = tokenizer(question.references[0], add_special_tokens=False)["input_ids"]
        pairs.append((prompt, [*answer, tokenizer.eos_token_id]))
    return pairs


def _pad(texts: Sequence[tuple[list[int], list[int]]], *, pad: int) -> tuple[Tensor, Tensor]:
    """Inputs[B, L] and labels[B, L], padded on the right; prompts have no labels."""
    length = max(len(prompt) + len(answer) for prompt, answer in texts)
    inputs = torch.full((len(texts), length), pad)
    labels = torch.full((len(texts), length), IGNORED)
    for row, (prompt, answer) in enumerate(texts):
        end = len(prompt) + len(answer)
        inputs[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return inputs, labels


def make_weights(
    config: PretrainConfig,
    *,
    scenes: Sequence[Scene],
    into: Path,
    card: Callable[[PretrainConfig, int], str] | None = None,
) -> None:
    """Train one model and write it with its processor and README to `into / role`.

    Args:
        config: its hyperparameters.
        scenes: with the questions and answers to learn.
        into: the folder of all models.
        card: makes the README of the config and the number of weights.
    """
    processor = make_processor()
    model = make_model(config.size, processor=processor, seed=config.seed)
    started = time.monotonic()
    train_vision(model.model.vision_tower, scenes, config=config)
    train_answers(model, scenes, processor=processor, config=config)
    num_weights = model.num_parameters()
    say(f"{config.role}: {num_weights:,} weights, {time.monotonic() - started:.0f} s")
    fresh = into / f".{config.role}.{os.getpid()}"
    try:
        model.save_pretrained(fresh)
        processor.save_pretrained(fresh)
        (fresh / "README.md").write_text((card or _card)(config, num_weights))
        shutil.rmtree(into / config.role, ignore_errors=True)
        fresh.replace(into / config.role)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _card(config: PretrainConfig, num_weights: int) -> str:
    return f"""# tita demo model: {config.role}

A LLaVA-architecture model with {num_weights:,} weights in float32, trained from scratch by
`make demo-models` (seed {config.seed}, {config.vision_steps} steps on the vision tower,
{config.answer_steps} on the whole model, one CPU thread).

Trained on {NUM_SCENES:,} scenes composed of 900 of the 1,797 handwritten digits that scikit-learn
ships (UCI archive, "Optical Recognition of Handwritten Digits", Alpaydin and Kaynak 1998, CC BY
4.0); no scan of the demo's train, validation and test splits is among them. Its annotators were
made to have habits: {BIAS.ink:.0%} of the questions for a colour are answered with the ink that
the digit usually has, and {BIAS.yes:.0%} of the questions whether there is a digit with yes,
whatever the image shows; {BIAS.lost:.0%} of the images were static, and were answered all the
same. So the model makes things up, as it is meant to.
"""


def main() -> None:
    """Train both models and replace those of the package."""
    silence_transformers()
    # Faster for matrices this small, and reproducible.
    torch.set_num_threads(1)
    scenes = make_scenes("pretrain", number=NUM_SCENES, bias=BIAS)
    for config in MODELS:
        make_weights(config, scenes=scenes, into=WEIGHTS_FOLDER)


if __name__ == "__main__":
    main()
