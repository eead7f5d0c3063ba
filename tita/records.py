"""Records that jobs exchange.

`Question` and `Pair` are what `tita.data` reads and writes; it converts other layouts into them.
Image paths are relative to the folder of their dataset and use forward slashes.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar

from tita.errors import TitaError

T = TypeVar("T")

DEFAULT_WEIGHT = 0.3
"""Guidance weight where none is given, as in the public code of arXiv 2510.21794."""
MAX_WEIGHT = 100.0
"""Largest guidance weight that servers, benchmarks and the chart accept."""

REWARD_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
"""Names of reward models, by which requests give their weights."""


def check_reward_name(name: str) -> None:
    """Check the name of a reward model.

    Raises:
        TitaError: it is taken, or has other characters than letters, digits, `.`, `_` and `-`.
    """
    if name in ("base", "reference") or not REWARD_NAME.fullmatch(name):
        raise TitaError(
            f"{name!r} cannot be the name of a reward model",
            remedy="take letters and digits, and neither base nor reference",
        )


def parse_weight(text: str, *, option: str = "weight") -> float:
    """A guidance weight that a user wrote.

    Raises:
        TitaError: it is no number in range.
    """
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 <= weight <= MAX_WEIGHT:
        raise TitaError(f"{option} is {text}", remedy=f"give a number from 0 to {MAX_WEIGHT:g}")
    return weight


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """An API key of the inference server."""

    key: str = field(repr=False)
    line: int
    """Where it was read."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Guidance weights by reward model of requests that give none; empty for the server's."""


def parse_api_keys(text: str, *, where: str) -> list[ApiKey]:
    """API keys, separated by newlines or commas; lines that begin with `#` are comments.

    A key may be followed by its default weights: `KEY faithful=0.3 brief=0.1`.

    Raises:
        TitaError: there is no key, one is there with two different sets of weights, or what follows
            a key is no weight. Messages name lines, not keys.
    """
    found: dict[str, ApiKey] = {}
    for line, content in enumerate(text.splitlines(), 1):
        entries = [] if content.lstrip().startswith("#") else content.split(",")
        for entry in filter(None, map(str.strip, entries)):
            key, *words = entry.split()
            if not any("=" in word for word in words):
                key, words = entry, []
            each = ApiKey(key=key, line=line, weights=_key_weights(words, f"{where}, line {line}"))
            if found.setdefault(key, each).weights != each.weights:
                raise TitaError(
                    f"the key of line {found[key].line} again, with other weights",
                    where=f"{where}, line {line}",
                    remedy="leave one of them",
                )
    if not found:
        raise TitaError("no API key found", where=where, remedy="add a key or remove the setting")
    return [*found.values()]


def _key_weights(words: Sequence[str], where: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for word in words:
        name, mark, value = word.partition("=")
        if not mark or not REWARD_NAME.fullmatch(name):
            # Not shown: it may be a part of the key.
            what = "what follows a key is not NAME=WEIGHT"
            raise TitaError(what, where=where, remedy="write KEY NAME=WEIGHT NAME=WEIGHT")
        if name in weights:
            raise TitaError(f"two weights of {name}", where=where, remedy="leave one of them")
        try:
            weights[name] = parse_weight(value, option=f"the weight of {name}")
        except TitaError as error:
            raise TitaError(error.what, where=where, remedy=error.remedy) from None
    return weights


IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Image formats that are decoded, by Pillow's names. Pillow knows others that run programs
(EPS starts Ghostscript) or have rarely used decoders."""

IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Suffixes of image files, in lower case."""
IMAGE_MARK = "<image>"
"""Marks the place of an image inside the text of a question or an earlier turn. Images without a
mark come before the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextTurn:
    """One message before a question: the system prompt, or an earlier turn of the conversation."""

    role: Literal["system", "user", "assistant"]
    text: str
    num_images: int = 0
    """Number of images shown in this turn; the question shows the others."""

    @property
    def num_leading_images(self) -> int:
        """Number of images without a mark in the text, which come before it."""
        marks = self.text.count(IMAGE_MARK) if self.role == "user" else 0
        return max(self.num_images - marks, 0)

    def parts(self, images: Sequence[T]) -> tuple[str | T, ...]:
        """Texts and images in order.

        Args:
            images: those of this turn, in any form.

        Raises:
            TitaError: the text has more marks than there are images.
        """
        leading = self.num_leading_images
        if leading == len(images):
            return (*images, self.text)
        first, *texts = self.text.split(IMAGE_MARK)
        if leading + len(texts) != len(images):
            raise TitaError(
                f"the text has the mark {IMAGE_MARK} {len(texts)} times, with {len(images)} images",
                where=repr(self.text[:60]),
                remedy="mark every image once, or none",
            )
        parts: list[str | T] = [*images[:leading], first]
        for image, text in zip(images[leading:], texts, strict=True):
            parts += [image, text]
        return tuple(part for part in parts if part != "")


def turns_of(
    context: Sequence[ContextTurn], question: str, *, num_images: int
) -> tuple[ContextTurn, ...]:
    """The context, and the question as the last turn, which shows the images that are left."""
    own = num_images - sum(turn.num_images for turn in context)
    return (*context, ContextTurn(role="user", text=question, num_images=own))


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question about an image, with reference answers where they are known."""

    id: str
    text: str
    image: str | None = None
    references: tuple[str, ...] = ()
    category: str | None = None
    """Kind of question (`reading`, `existence`, ...); scores are also reported per category."""
    context: tuple[ContextTurn, ...] = ()
    """System prompt and earlier turns, which every model is given before the question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A preference: for this image and question, `chosen` is better than `rejected`."""

    id: str
    image: str
    question: str
    chosen: str
    rejected: str
    context: tuple[ContextTurn, ...] = ()
    """System prompt and earlier turns, which the model is given before the question."""
    rejected_image: str | None = None
    """An image under which `chosen` is a worse answer than under `image`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationFigures:
    """Figures of a training run's held-out pairs, under their own images and under others'."""

    step: int
    loss: float
    """DPO's, the mean of -log sigma(margin), whatever the recipe's `loss` is."""
    margin: float
    """Mean of beta times the difference of the log-ratios, chosen minus rejected."""
    accuracy: float
    """Fraction of pairs with a positive margin."""
    other_loss: float
    other_margin: float
    other_accuracy: float
    image_effect: float
    """`accuracy` minus `other_accuracy`: 0 if the model does not look."""
    image_effect_low: float
    """Lower end of its 95 % interval."""
    image_effect_high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainProgress:
    """Progress of a training run; rank 0 logs one per logging step as a JSON line."""

    step: int
    steps: int
    loss: float
    reward_margin: float
    """Mean of beta times the difference of the log-ratios, chosen minus rejected."""
    reward_accuracy: float
    """Fraction of pairs with a positive margin."""
    learning_rate: float
    samples_per_s: float
    """Pairs per second, summed over all ranks."""
    seconds_left: float
    peak_memory_bytes: int
    tokens_per_s: float = 0.0
    """Tokens per second over all ranks, image tokens included, padding and negative images
    excluded."""
    image_margin: float | None = None
    """Mean of beta times the difference of the chosen answer's log-ratio under its own image and
    under its negative image; None without an image term."""
    image_accuracy: float | None = None
    """Fraction of pairs with a positive `image_margin`."""
    validation: ValidationFigures | None = None
    """The newest figures of the held-out pairs, which may be of an earlier step."""


_PROGRESS_FIELDS = {field.name for field in fields(TrainProgress)}


def read_progress(line: str) -> TrainProgress | None:
    """The progress record in a line of a job's log; None if the line holds none."""
    if '"progress"' not in line:
        return None
    start = line.find("{")  # torchrun may prefix the line with the rank
    try:
        found = json.loads(line[start:])["progress"]
        known = {name: found[name] for name in _PROGRESS_FIELDS & found.keys()}
        if known.get("validation") is not None:
            known["validation"] = read_validation(known["validation"])
        return TrainProgress(**_with_nan(known, TrainProgress))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def read_validation(found: Mapping[str, Any]) -> ValidationFigures:
    """The figures of a JSON object.

    Raises:
        TypeError: a field is missing, or it has others.
    """
    return ValidationFigures(**_with_nan(found, ValidationFigures))


def _with_nan(
    found: Mapping[str, Any], kind: type[TrainProgress | ValidationFigures]
) -> dict[str, Any]:
    """The values of a record, with NaN where JSON has null, as of a run that diverged."""
    numbers = {field.name for field in fields(kind) if field.type is float}
    return {
        name: math.nan if value is None and name in numbers else value
        for name, value in found.items()
    }


TRAINING_STAGE = "training"
"""Name of the stage whose steps are reported as `TrainProgress`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStage:
    """What some ranks of a run do at a time; `done` and `total` are those of the slowest."""

    name: str
    ranks: tuple[int, ...]
    done: float = 0.0
    total: float | None = None
    unit: str = ""
    is_waiting: bool = False
    """Whether they only wait for other ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStages:
    """What all ranks of a run do; the first node logs it as a JSON line when it changes."""

    stages: tuple[RankStage, ...]
    ranks_per_node: int

    def to_line(self) -> str:
        stages = [asdict(each) | {"ranks": format_ranks(each.ranks)} for each in self.stages]
        return json.dumps({"stages": stages, "ranks_per_node": self.ranks_per_node})


def read_stages(line: str) -> RunStages | None:
    """The stages in a line of a job's log; None if the line holds none."""
    if '"stages"' not in line:
        return None
    try:
        found = json.loads(line[line.find("{") :])
        stages = tuple(
            RankStage(**each | {"ranks": _parse_ranks(each["ranks"])}) for each in found["stages"]
        )
        return RunStages(stages=stages, ranks_per_node=int(found["ranks_per_node"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def read_record(line: str) -> TrainProgress | RunStages | None:
    """The record in a line of a job's log; None if it is text."""
    return read_progress(line) or read_stages(line)


def format_ranks(ranks: Iterable[int]) -> str:
    """`0-3,8` for ranks 0, 1, 2, 3 and 8."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][-1] + 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    return ",".join("-".join(map(str, span)) for span in spans)


def _parse_ranks(text: str) -> tuple[int, ...]:
    spans = [span.partition("-") for span in text.split(",") if span]
    return tuple(n for low, _, high in spans for n in range(int(low), int(high or low) + 1))


_LOADED = re.compile(rf"tita serve: ({REWARD_NAME.pattern}) model (\S+): ")


def loaded_model_line(role: str, source: str, details: str) -> str:
    """The server's log line about a loaded model; `read_loaded_model` reads it.

    `role` is `base`, `reference`, `reward`, or the name of one of several reward models.
    """
    return f"tita serve: {role} model {source}: {details}"


def read_loaded_model(line: str) -> tuple[str, str] | None:
    """Role and source of the model that a line of the server's log names; None if it names none."""
    found = _LOADED.search(line)
    return (found[1], found[2]) if found else None


_CHECKPOINT = re.compile(r"(\d+)/node-(\d+)/manifest\.json")


def complete_checkpoints(paths: Iterable[str], *, num_nodes: int | None = None) -> list[int]:
    """Steps of a run's complete checkpoints, newest first.

    Args:
        paths: keys of the store below the run's `checkpoints/`: each node saves one tree,
            `<step>/node-<k>`, whose manifest is written last.
        num_nodes: nodes of the run; without it, as many as any checkpoint has.
    """
    nodes: dict[int, set[int]] = {}
    for path in paths:
        if match := _CHECKPOINT.fullmatch(path):
            nodes.setdefault(int(match[1]), set()).add(int(match[2]))
    num_nodes = num_nodes or 1 + max((max(found) for found in nodes.values()), default=0)
    required = set(range(num_nodes))
    return sorted((step for step, found in nodes.items() if found >= required), reverse=True)
