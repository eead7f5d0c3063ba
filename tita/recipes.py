"""Recipes: the hyperparameters of every job, typed; unknown keys are refused.

The launcher checks a recipe with the same types as the worker in the pod, so a misspelt key never
costs a GPU minute. The defaults here are the job's; `jobs/<job>.yaml` may set others, a recipe
file and `--set` others still, in this order.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tita.errors import TitaError
from tita.jobspec import load_job, merge

# YAML 1.1 reads 2e-6 as text; people mean the number.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
ImageAspect = Literal["auto", "pad", "keep"]
"""`pad` makes images square with bars, `keep` leaves their form; `auto` goes by the checkpoint."""


class Recipe(BaseModel):
    """What all recipes share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = 0


class PairsRecipe(Recipe):
    """`build-pairs`: self-supervised preference pairs as in SeVa (arXiv 2404.10501)."""

    model: str = "base"
    """The base VLM: a hub name, a path, or a tree in the store."""
    questions: str
    """Question file or folder, in the store or a path."""
    images: str | None = None
    """Folder that the questions' image paths start from, in the store or a path; the questions'
    own folder if not given."""
    out: str | None = None
    """Where in the store the pairs go; `pairs/<run>` if not given."""
    distortions: tuple[Literal["diffusion", "crop", "blur", "downscale"], ...] = ("diffusion",)
    """What is done to the image before the rejected answer; each makes a candidate a question."""
    diffusion_steps: Annotated[int, Field(ge=1, le=999)] = 500
    """Step t of 1,000 of `noise`; SeVa made sets with 500 and with 800, VCD uses 500."""
    noise: Literal["seva", "ddpm"] = "seva"
    """The noise of `diffusion`: SeVa's, on what the vision tower is given, or the stronger one of
    DDPM's linear schedule on the image's pixels (`tita.pairs.distort`)."""
    chosen: Literal["clean", "reference"] = "clean"
    """The chosen answer: the model's own to the clean image, or the question's reference."""
    agreement: Literal["normalised", "exact"] = "normalised"
    """When two answers are the same and make no pair: once case, punctuation, articles and words
    for numbers are out of the way (`tita.data.normalise`), or letter by letter as in SeVa."""
    judge: str | None = None
    """What decides which answer is better, or that neither is: `exact-match` with the question's
    references, an entry point of `tita.judges`, or `package.module:name` (`tita.pairs.judges`)."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 is greedy; above it both answers to a question are drawn with the same random numbers."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Where answers are drawn: from the fewest likeliest tokens that have this much together."""
    max_new_tokens: Count = 64
    batch_size: Count = 16
    max_questions: Count | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    image_aspect: ImageAspect = "auto"
    """How images are shown to the model (`tita.vlm.aspect_of`)."""
    peer_timeout_s: Positive = 1800.0
    """Workers that finish no batch for so long, while worker 0 waits for them, are taken for lost;
    the run is tried again and goes on where it was."""


class LoraRecipe(BaseModel):
    """Low-rank adaptation (arXiv 2106.09685) by peft."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: Count = 64
    alpha: Positive = 128.0
    dropout: Fraction = 0.05
    target_modules: str | tuple[str, ...] = "all-linear"


class WarmUpRecipe(BaseModel):
    """Supervised steps before DPO: the reward model comes near the base before it corrects it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: Count
    answers: str | None = None
    """Questions with the base model's own answers, a file or folder in the store or a path; the
    pairs' chosen answers if not given, which are the base's own as `build-pairs` makes them."""
    learning_rate: Positive = 2e-5


class TrainRecipe(Recipe):
    """`train-dpo`: DPO (arXiv 2305.18290) of the reward VLM; defaults are the paper's setting."""

    model: str
    """The reward VLM to start from: a hub name, a path, or a tree in the store."""
    pairs: str
    """Preference pairs: a file or folder, in the store or a path."""
    images: str | None = None
    """Folder that the pairs' image paths start from, in the store or a path; the pairs' own folder
    if not given."""
    out: str | None = None
    """Where in the store the run's folder goes; `runs/<run>` if not given."""
    deepspeed: str = "zero2"
    """A file of `jobs/deepspeed`, by name."""
    sft: WarmUpRecipe | None = None
    """A supervised warm-up; the reference of the DPO is the model after it."""
    beta: Positive = 0.1
    nll_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the negative log-likelihood of the chosen answers, added to the DPO loss."""
    learning_rate: Positive = 2e-6
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    epochs: Positive = 1.0
    max_steps: Count | None = None
    batch_size: Count = 8
    """Pairs per device and step."""
    gradient_accumulation: Count = 1
    max_length: Count = 2048
    """Tokens of prompt and answer, image tokens included; nothing is ever cut."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """What becomes of pairs above `max_length`."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    gradient_checkpointing: bool = True
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """How attention is computed; transformers chooses if not given."""
    image_aspect: ImageAspect = "auto"
    """How images are shown to it; the trained model says so of itself (`tita.vlm.aspect_of`)."""
    lora: LoraRecipe | None = None
    freeze_vision: bool = True
    """Leave the vision tower as it is, with LoRA too."""
    logging_steps: Count = 10
    save_steps: Count = 200
    """Steps between two checkpoints."""
    hang_timeout_s: Positive = 1800.0
    """A rank without a finished step for so long is taken for hung, and ended."""


class BenchmarkRecipe(Recipe):
    """`benchmark`: ask an endpoint with weight 0 and with the release's weight, and compare."""

    base_url: str | None = None
    """The endpoint, `http://host:port/v1`; on a cluster the release's inference Service."""
    model: str = "tita"
    questions: str | None = None
    """Question file in the store or a path; the sample questions if not given."""
    images: str | None = None
    weights: Annotated[tuple[Fraction, ...], Field(min_length=1)] = (0.0, 0.3)
    concurrency: Count = 8
    timeout_s: Positive = 120.0
    max_new_tokens: Count = 128
    max_questions: Count | None = None
    fail_below: float | None = None
    """Lowest score difference to the last good report that still passes the gate."""
    fail_slower: Positive | None = None
    """Highest latency ratio to the last good report that still passes the gate."""


RECIPES: Mapping[str, type[Recipe]] = {
    "benchmark": BenchmarkRecipe,
    "build-pairs": PairsRecipe,
    "train-dpo": TrainRecipe,
}


def load_recipe(
    job: str,
    *,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    laid_over: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe of one run: the job's own, then `file`, then `laid_over`, then `overrides`.

    Args:
        job: name of a job in `jobs/`.
        file: YAML file with some of the recipe's keys.
        overrides: `key=value` each, nested keys with dots, the value read as YAML.
        laid_over: keys that a launcher put into the run (`TITA_RECIPE`).

    Raises:
        TitaError: an unknown key, a value that does not fit, or a file that is no mapping.
    """
    values = merge(load_job(job).recipe, read_overrides(file=file))
    values = merge(values, laid_over or {})
    values = merge(values, read_overrides(overrides=overrides))
    return check_recipe(job, values)


def read_overrides(*, file: Path | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The keys of a recipe file with those of `--set` laid over, unchecked.

    Raises:
        TitaError: a file that is no mapping, or text that is not `key=value`.
    """
    values = {} if file is None else _read_mapping(file)
    for override in overrides:
        values = merge(values, _parse_override(override))
    return values


def check_recipe(job: str, values: Mapping[str, Any]) -> Recipe:
    """`values` as the recipe type of `job`.

    Raises:
        TitaError: an unknown key (with the nearest known one) or a value that does not fit.
    """
    kind = RECIPES.get(job)
    if kind is None:
        raise TitaError(f"job {job!r} takes no recipe", remedy="add its type to tita.recipes")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _first_fault(kind, error, where=f"recipe of {job}") from None


def _first_fault(kind: type[BaseModel], error: ValidationError, *, where: str) -> TitaError:
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        known = _known_keys(kind, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"
        return TitaError(f"unknown key {key!r}", where=where, remedy=remedy)
    hint = f"give --set {key}=..." if first["type"] == "missing" else None
    return TitaError(f"{key}: {first['msg'].lower()}", where=where, remedy=hint)


def _known_keys(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        field = kind.model_fields.get(part)
        inner = (field.annotation, *get_args(field.annotation)) if field else ()
        kind = next((k for k in inner if isinstance(k, type) and issubclass(k, BaseModel)), kind)
    return list(kind.model_fields)


def parse_laid_over(text: str | None) -> dict[str, Any]:
    """The JSON object of `TITA_RECIPE`; an empty mapping if there is none.

    Raises:
        TitaError: the text is not a JSON object.
    """
    if not text:
        return {}
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise TitaError(f"not JSON ({error})", where="TITA_RECIPE") from None
    if not isinstance(values, dict):
        raise TitaError("not a JSON object", where="TITA_RECIPE")
    return values


def _read_mapping(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TitaError(f"not YAML ({error})", where=str(file)) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise TitaError("a recipe is a mapping of keys to values", where=str(file))
    return values


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, raw = text.partition("=")
    if not (key and equals):
        raise TitaError(f"{text!r} is not key=value", where="--set", remedy="write --set beta=0.2")
    try:
        value: Any = yaml.safe_load(raw)
    except yaml.YAMLError:
        value = raw
    if isinstance(value, str):
        value = float(value) if _EXPONENT.fullmatch(value) else value
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]
