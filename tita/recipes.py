"""Recipes: the typed hyperparameters of every job; unknown keys are errors.

The launcher validates a recipe with the same types as the worker, so a misspelt key fails before
any GPU is allocated. Values come from these defaults, `jobs/<job>.yaml`, the release's values, a
recipe file and `--set`; later sources override earlier ones.
"""

import difflib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from tita.dpo_losses import Divergence, check_losses, parse_losses
from tita.errors import TitaError
from tita.jobspec import deepspeed_config, load_job, merge
from tita.recipe_sources import parse_overrides, parse_recipe_variable, read_recipe_file
from tita.records import DEFAULT_WEIGHT, MAX_WEIGHT
from tita.settings import settings

Fraction = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=MAX_WEIGHT)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Tracker = Literal["mlflow", "tensorboard", "trackio", "wandb"]
"""Experiment trackers; each is also the name of the Python module that it needs."""
ImageAspect = Literal["auto", "pad", "keep"]
"""`pad` makes images square with bars, `keep` leaves the aspect ratio; `auto` follows the
checkpoint."""


class _Strict(BaseModel):
    # A bound that is NaN is never exceeded.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    no_effect: ClassVar[frozenset[str]] = frozenset()
    """Fields that neither change what a job makes nor what it keeps for a restart."""

    def identity(self) -> dict[str, JsonValue]:
        """The fields that tell two runs apart: a run continues what one with equal ones has left.

        Any other may change between two starts of a run.
        """
        found: dict[str, JsonValue] = {}
        values = self.model_dump(mode="json", exclude=set(self.no_effect))
        for name, value in values.items():
            inner = getattr(self, name)
            found[name] = inner.identity() if isinstance(inner, _Strict) else value
        return found


class Recipe(_Strict):
    """Base class of all recipes."""

    job: ClassVar[str]
    """The name of the job, as in `jobs/<job>.yaml`."""

    data_keys: ClassVar[tuple[str, ...]] = ()
    """Keys that name data: a file or folder in the store, or a path."""

    seed: int = 0

    def is_equivalent_to(self, recorded: Any) -> bool:
        """Whether the recorded recipe of another run, as JSON, has the same `identity`."""
        try:
            other = type(self).model_validate(recorded)
        except (ValidationError, TitaError):
            return False
        return self.identity() == other.identity()


class ModelRecipe(Recipe):
    """Base class of the recipes of jobs that load models themselves."""

    allow_cpu: bool = False
    """Run on the CPU where the GPUs that a pod holds are not usable, instead of failing."""


BaseURL = Annotated[str, Field(pattern=r"^https?://[^@]+$")]
"""Base URL of an endpoint up to and including `/v1`, without a password."""


class EndpointRecipe(_Strict):
    """A model behind an OpenAI-compatible endpoint (`tita.pairs.endpoint`)."""

    no_effect = frozenset({"concurrency", "key_env", "retries", "timeout_s"})

    base_url: BaseURL
    model: str
    """The model's name at the endpoint."""
    key_env: str | None = None
    """Environment variable with the API key; by default none is sent."""
    concurrency: Count = 8
    """Requests in flight per worker."""
    timeout_s: Positive = 120.0
    retries: Annotated[int, Field(ge=0)] = 4
    """Retries of a request that failed, with growing pauses."""


class EndpointRankerRecipe(EndpointRecipe):
    """An endpoint that scores answers (`tita.pairs.endpoint`)."""

    criterion: str = (
        "The answer is correct and supported by the image. It claims nothing that the image does "
        "not show, and it leaves out nothing that the question asks for."
    )
    """What a good answer is, in the judge's prompt."""
    orders: Annotated[int, Field(ge=1, le=2)] = 1
    """2 asks a second time with the answers in reverse order, and takes the mean of the scores."""
    max_tokens: Count = 512
    """Maximum length of the judge's reply."""


class RewardRankerRecipe(_Strict):
    """The implicit reward of a model that was trained with DPO (`tita.pairs.implicit_reward`)."""

    model: str
    """The trained model: a tree in the store such as `runs/<run>/model`, a path, or a hub name."""
    reference: str
    """The model that its training started from."""


class TeacherEndpointRecipe(EndpointRecipe):
    """An endpoint whose answers are preferred (`tita.pairs.teacher`)."""

    extra_body: Mapping[str, JsonValue] = {}
    """Further fields of its requests, such as `guidance_form` of a tita server."""


class TaughtRecipe(_Strict):
    """Which answers a better one is preferred to (`tita.pairs.taught`)."""

    plain_copies: Annotated[int, Field(ge=0)] = 2
    """How often a pair against the base model's own answer is written; 0 leaves them out. They are
    few, because the two answers mostly agree."""
    distorted_copies: Annotated[int, Field(ge=0)] = 1
    """The same for pairs against the answer about a distorted image (`distortions`)."""


class TeacherRecipe(TaughtRecipe):
    """A teacher, whose answers are preferred: a model or an endpoint (`tita.pairs.teacher`)."""

    model: str | None = None
    """A VLM: a tree in the store, a path, or a hub name."""
    endpoint: TeacherEndpointRecipe | None = None


class ContrastRecipe(TaughtRecipe):
    """Contrastive decoding of the base model, whose answers are preferred (`tita.pairs.taught`).

    Or answers that reward models guide. Without a weight or a bound, those of the form's paper
    apply.
    """

    form: Literal["vcd", "m3id", "cfg", "tita", "genarm", "tita_vcd"] = "vcd"
    """`tita`, `genarm` and `tita_vcd` need `rewards`."""
    rewards: dict[str, str] = {}
    """Reward models by name, or their LoRA adapters: trees in the store, paths or hub names."""
    weights: dict[str, NonNegative] = {}
    """Weights by name; without any, `weight` is divided equally."""
    weight: NonNegative | None = None
    plausibility: Fraction | None = None
    noise_step: Annotated[int, Field(ge=1, le=999)] = 500
    """Diffusion step of the image that `vcd` contrasts with."""


class VllmRecipe(_Strict):
    """How engine `vllm` runs the base model; names as in vLLM's own options."""

    no_effect = frozenset({"enforce_eager", "gpu_memory_utilization", "tensor_parallel_size"})

    tensor_parallel_size: Count = 1
    """GPUs of one worker, which each layer is split over."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Fraction of a GPU's memory for weights and KV cache."""
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    """Maximum tokens of prompt and answer together; the model's by default."""
    enforce_eager: bool = False
    """Do not compile the model."""


class PairsRecipe(ModelRecipe):
    """`build-pairs`: preference pairs from distorted images, as in SeVa (arXiv 2404.10501), from
    answers that a judge ranks, as in RLAIF-V (arXiv 2405.17220) and Silkie (arXiv 2312.10665), or
    from contrastive decoding."""

    job = "build-pairs"
    data_keys = ("questions", "images")
    no_effect = frozenset({"allow_cpu", "out", "peer_timeout_s"})

    model: str = "base"
    """The base VLM: a hub name, a path, or a tree in the store."""
    questions: str
    """Question file or folder, in the store or a path."""
    images: str | None = None
    """Base folder of the questions' image paths, in the store or a path; by default the questions'
    own folder."""
    ignore_columns: tuple[str, ...] = ()
    """Columns of the questions that are treated as absent; any other unused column is an error."""
    out: str | None = None
    """Destination in the store; `pairs/<run>` by default."""
    strategy: Literal["distort", "judge", "contrast", "teacher"] = "distort"
    """`distort`: the rejected answer is about a distorted image. `judge`: several sampled answers
    are ranked, and the best is preferred to the worst. `contrast`: the answer of contrastive
    decoding is preferred to the plain one, and to one about a distorted image. `teacher`: so is the
    answer of another model."""
    contrast: ContrastRecipe = ContrastRecipe()
    """Contrastive decoding, for `strategy=contrast`."""
    teacher: TeacherRecipe = TeacherRecipe()
    """The other model, for `strategy=teacher`."""
    samples: Annotated[int, Field(ge=2)] = 4
    """Sampled answers per question, for `strategy=judge`."""
    endpoint: EndpointRankerRecipe | None = None
    """Ranks by a judge model; for `strategy=judge`."""
    reward: RewardRankerRecipe | None = None
    """Ranks by the implicit reward of a trained model; for `strategy=judge`."""
    distortions: tuple[Literal["diffusion", "crop", "blur", "downscale"], ...] = ("diffusion",)
    """How the image is distorted for the rejected answer; each makes one candidate per question."""
    diffusion_steps: Annotated[int, Field(ge=1, le=999)] = 500
    """Step t of 1,000 of `noise`; SeVa uses 500 and 800, VCD uses 500."""
    noise: Literal["seva", "ddpm"] = "seva"
    """The noise of `diffusion`: SeVa's, added to the vision tower's input, or the stronger noise of
    DDPM's linear schedule, added to the image's pixels (`tita.vlm.noise`)."""
    chosen: Literal["clean", "reference"] = "clean"
    """The chosen answer: the model's answer to the clean image, or the question's reference."""
    agreement: Literal["normalised", "exact"] = "normalised"
    """How two answers are compared; equal answers make no pair. `normalised` ignores case,
    punctuation, articles and number words (`tita.data.normalise`); `exact` is SeVa's."""
    judge: str | None = None
    """Decides which answer is better, or that neither is: `exact-match` with the question's
    references, an entry point of `tita.judges`, or `package.module:name` (`tita.pairs.judges`)."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 is greedy; otherwise both answers to a question use the same random numbers."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: sample from the most likely tokens whose probabilities sum to this."""
    max_new_tokens: Count = 64
    batch_size: Count = 16
    """Questions of one batch, which the engine answers together."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """The inference engine that runs the base model (docs/engines.md)."""
    vllm: VllmRecipe = VllmRecipe()
    """For `engine=vllm`."""
    max_questions: Count | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    image_aspect: ImageAspect = "auto"
    """Aspect ratio of the images that the model gets (`tita.vlm.images.aspect_of`)."""
    peer_timeout_s: Positive = 1800.0
    """Worker 0 treats the others as lost if they finish no batch for this long; the run is retried
    and resumes."""

    @model_validator(mode="after")
    def _strategy_fits(self) -> "PairsRecipe":
        fault = remedy = None
        used = {
            "distort": ("distortions", "diffusion_steps", "noise", "chosen", "judge"),
            "judge": ("samples", "endpoint", "reward"),
            "contrast": ("distortions", "diffusion_steps", "noise", "contrast"),
            "teacher": ("distortions", "diffusion_steps", "noise", "teacher"),
        }
        for strategy, names in used.items():
            for name in names:
                default = type(self).model_fields[name].default
                if name not in used[self.strategy] and getattr(self, name) != default:
                    fault = f"`{name}` has no effect with `strategy={self.strategy}`"
                    remedy = f"remove it, or --set strategy={strategy}"
        if fault is None:
            fault, remedy = self._taught_fault()
        if fault is None and self.strategy == "judge":
            if (self.endpoint is None) == (self.reward is None):
                fault = "`strategy=judge` ranks by either `endpoint` or `reward`"
                remedy = "--set endpoint.base_url=... --set endpoint.model=..."
            elif not self.temperature:
                fault = "`strategy=judge` samples answers, and at temperature 0 all are equal"
                remedy = "--set temperature=1"
        if fault is None:
            fault, remedy = self._contrast_fault()
        if fault is None and self.engine == "vllm" and self.strategy == "contrast":
            fault = f"engine vllm does not build pairs with the form {self.contrast.form}"
            remedy = "--set engine=transformers"
        if fault is None and self.engine != "vllm" and self.vllm != VllmRecipe():
            fault, remedy = "`vllm` has no effect without `engine=vllm`", "--set engine=vllm"
        if fault is not None:
            raise TitaError(fault, where="recipe of build-pairs", remedy=remedy)
        return self

    def _taught_fault(self) -> tuple[str | None, str | None]:
        """What is missing in the settings of `contrast` or `teacher`, and the remedy."""
        taught = {"contrast": self.contrast, "teacher": self.teacher}.get(self.strategy)
        if taught and not taught.plain_copies + taught.distorted_copies:
            return "both kinds of pairs are left out", f"--set {self.strategy}.plain_copies=2"
        sources = (self.teacher.model, self.teacher.endpoint)
        if self.strategy == "teacher" and sources.count(None) != 1:
            what = "`strategy=teacher` asks either `teacher.model` or `teacher.endpoint`"
            return what, "--set teacher.model=..."
        return None, None

    def _contrast_fault(self) -> tuple[str | None, str | None]:
        """What contradicts itself in `contrast`, and the remedy."""
        form, rewards = self.contrast.form, self.contrast.rewards
        guided = form in ("tita", "genarm", "tita_vcd")
        unknown = next((name for name in self.contrast.weights if name not in rewards), None)
        if self.strategy == "contrast" and guided and not rewards:
            what = f"`contrast.form={form}` without reward models"
            return what, "--set contrast.rewards.faithful=runs/NAME/model"
        if rewards and not guided:
            what = f"`contrast.rewards` has no effect with `contrast.form={form}`"
            return what, "remove it, or --set contrast.form=tita"
        if unknown is not None:
            what = f"`contrast.weights.{unknown}`: no reward model {unknown!r}"
            return what, f"--set contrast.rewards.{unknown}=..."
        return None, None


class LoraRecipe(_Strict):
    """Low-rank adaptation (arXiv 2106.09685) by peft."""

    rank: Count = 64
    alpha: Positive = 128.0
    dropout: Fraction = 0.05
    target_modules: str | tuple[str, ...] = "all-linear"


class WarmUpRecipe(_Strict):
    """Supervised fine-tuning before DPO, which brings the reward model close to the base model."""

    steps: Count
    answers: str | None = None
    """Questions with the base model's answers: a file or folder in the store, or a path. By default
    the pairs' chosen answers, which `build-pairs` takes from the base model."""
    learning_rate: Positive = 2e-5


class ImagePreferenceRecipe(_Strict):
    """mDPO's two terms beside the loss (arXiv 2406.11839); `tita.train.image_preference`."""

    weight: NonNegative = 1.0
    """Weight of the image term: an answer is preferred under its own image to the same answer under
    the negative image. 0 needs no negative images."""
    negative: Literal["other", "crop", "noise", "rejected_image"] = "other"
    """The negative image: another pair's, at most a fifth of the own one enlarged, the own one
    under noise, or the column `rejected_image` of the pairs."""
    anchor: NonNegative = 1.0
    """Weight of the anchor: the chosen answer does not become less likely than in the reference."""


class TrainRecipe(ModelRecipe):
    """`train-dpo`: DPO (arXiv 2305.18290) of the reward VLM; the defaults are TITA's settings."""

    job = "train-dpo"
    data_keys = ("pairs", "images", "validation")
    no_effect = frozenset(
        {
            *("allow_cpu", "attention", "gradient_checkpointing", "hang_timeout_s"),
            *("logging_steps", "out", "report_to", "save_steps"),
        }
    )

    model: str
    """The reward VLM to start from: a hub name, a path, or a tree in the store."""
    pairs: str
    """Preference pairs: a file or folder, in the store or a path."""
    images: str | None = None
    """Base folder of the pairs' image paths, in the store or a path; by default the pairs' own
    folder."""
    ignore_columns: tuple[str, ...] = ()
    """Columns of the pairs that are treated as absent; any other unused column is an error."""
    balance: Literal["answers"] | None = None
    """`answers`: leave out as few pairs as possible so that no short answer is chosen more often
    than rejected (`tita.data.balance`)."""
    out: str | None = None
    """Destination in the store; `runs/<run>` by default."""
    deepspeed: str = "zero2"
    """The name of a file in `jobs/deepspeed`."""
    sft: WarmUpRecipe | None = None
    """Supervised warm-up; DPO's reference model is the model after it."""
    beta: Positive = 0.1
    loss: Mapping[str, NonNegative] = Field(default_factory=lambda: {"sigmoid": 1.0})
    """Weight by name of TRL's losses (`tita.dpo_losses`): a name, the preset `mpo`, a list, or a
    mapping."""
    nll_weight: NonNegative = 0.0
    """Weight of the chosen answers' negative log-likelihood, TRL's loss `sft`."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a preference is wrong, for `robust`, `exo_pair`, `aot` and
    `aot_unpaired`."""
    ld_alpha: Fraction | None = None
    """LD-DPO's weight of the tokens by which an answer is longer than the other (arXiv
    2409.06411)."""
    f_divergence: Divergence = "reverse_kl"
    """Divergence from the reference model (arXiv 2309.16240)."""
    f_alpha_divergence_coef: Positive | None = None
    """Coefficient of `alpha_divergence`; 0.5 by default."""
    image_preference: ImagePreferenceRecipe | None = None
    """Further terms of the loss that depend on the image."""
    learning_rate: Positive = 2e-6
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    epochs: Positive = 1.0
    max_steps: Count | None = None
    batch_size: Count = 8
    """Pairs per device and forward pass."""
    gradient_accumulation: Count = 1
    max_length: Count = 2048
    """Maximum tokens of prompt and answer, image tokens included; nothing is truncated."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """How to handle pairs above `max_length`."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    gradient_checkpointing: bool = True
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """Attention implementation; transformers chooses by default."""
    image_aspect: ImageAspect = "auto"
    """Image aspect (`tita.vlm.images.aspect_of`); saved in the trained model's config."""
    lora: LoraRecipe | None = None
    quantization: Literal["4bit"] | None = None
    """QLoRA (arXiv 2305.14314): the frozen weights of the language model in 4 bits (NF4)."""
    freeze_vision: bool = True
    """Do not train the vision tower, with LoRA either."""
    validation: str | float | None = None
    """Held-out pairs: a share of the pairs, split by image, or a file or folder of other pairs."""
    eval_steps: Count = 100
    """Steps between evaluations of the held-out pairs; the last step is evaluated too."""
    keep: Literal["last", "best"] = "last"
    """The weights that the run ends with: the last ones, or those with the least validation
    loss."""
    early_stopping: Count | None = None
    """Evaluations in a row without a lower validation loss after which the run ends."""
    logging_steps: Count = 10
    report_to: tuple[Tracker, ...] = ()
    """Experiment trackers that get the figures of every logging step while the run is in progress
    (`tita.train.trackers`)."""
    save_steps: Count = 200
    """Steps between checkpoints."""
    hang_timeout_s: Positive = 1800.0
    """A rank that finishes no step, or makes no progress before the first and after the last one,
    for this long is considered hung and ended."""

    def identity(self) -> dict[str, JsonValue]:
        """As of all recipes; `eval_steps` counts where evaluations choose the weights."""
        found = super().identity()
        if self.keep == "last" and self.early_stopping is None:
            del found["eval_steps"]
        return found

    @field_validator("deepspeed")
    @classmethod
    def _known_deepspeed(cls, name: str) -> str:
        deepspeed_config(name)
        return name

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("report_to")
    @classmethod
    def _each_once(cls, value: tuple[Tracker, ...]) -> tuple[Tracker, ...]:
        return tuple(dict.fromkeys(value))

    @field_validator("loss", mode="before")
    @classmethod
    def _losses(cls, value: Any) -> Any:
        return parse_losses(value)

    @model_validator(mode="after")
    def _settings_fit(self) -> "TrainRecipe":
        check_losses(
            self.loss,
            nll_weight=self.nll_weight,
            label_smoothing=self.label_smoothing,
            divergence=self.f_divergence,
            has_alpha=self.f_alpha_divergence_coef is not None,
        )
        if isinstance(self.validation, float) and not 0 < self.validation < 1:
            raise TitaError(
                f"validation: {self.validation:g} is not a share between 0 and 1",
                where="recipe of train-dpo",
                remedy="--set validation=0.05",
            )
        if self.quantization is not None:
            self._check_quantization()
        if self.validation is None and (self.keep == "best" or self.early_stopping is not None):
            name = "early_stopping" if self.keep == "last" else "keep=best"
            raise TitaError(
                f"`{name}` needs held-out pairs",
                where="recipe of train-dpo",
                remedy="--set validation=0.05",
            )
        if self.image_preference is not None:
            for name, used in (
                ("ld_alpha", self.ld_alpha is not None),
                ("f_divergence", self.f_divergence != "reverse_kl"),
            ):
                if used:
                    raise TitaError(
                        f"`image_preference` is not defined with `{name}`",
                        where="recipe of train-dpo",
                        remedy="remove one of them",
                    )
        return self

    def _check_quantization(self) -> None:
        fault = None
        if self.lora is None:
            fault = "trains adapters only", "--set lora.rank=64"
        elif self.deepspeed.startswith("zero3"):
            fault = f"does not go with deepspeed={self.deepspeed}", "--set deepspeed=zero2"
        elif self.dtype != "bfloat16":
            fault = f"does not go with dtype={self.dtype}", "--set dtype=bfloat16"
        if fault is not None:
            what = f"`quantization={self.quantization}` {fault[0]}"
            raise TitaError(what, where="recipe of train-dpo", remedy=fault[1])


class BenchmarkRecipe(Recipe):
    """`benchmark`: query an endpoint with weight 0 and with the release's weight, and compare."""

    job = "benchmark"
    data_keys = ("questions", "images")

    base_url: BaseURL | None = None
    """The endpoint, `http://host:port/v1`; on a cluster, the release's inference Service."""
    model: str = "tita"
    questions: str | None = None
    """Question file, in the store or a path. By default 24 sample questions, which show that the
    server answers; their scores prove nothing."""
    images: str | None = None
    """Base folder of the questions' image paths, in the store or a path; by default the questions'
    own folder."""
    metric: str = ""
    """Metric of the questions that name none; by default they are not scored."""
    ignore_columns: tuple[str, ...] = ()
    """Columns of the questions that are treated as absent; any other unused column is an error."""
    weights: Annotated[
        tuple[Weight | Annotated[dict[str, Weight], Field(min_length=1)], ...], Field(min_length=1)
    ] = (0.0, DEFAULT_WEIGHT)
    """Each a number, or the weights of several reward models by name."""
    concurrency: Count = 8
    timeout_s: Positive = 120.0
    max_new_tokens: Count = 128
    max_questions: Count | None = None
    wait_ready_s: Positive = 900.0
    """Maximum time to wait until the endpoint is ready, at the start and after failures."""
    max_missing: Fraction = 0.02
    """Maximum share of the questions without an answer; with more, the benchmark is incomplete."""
    fail_below: float | None = None
    """Minimum score difference, in points of 100, to the last good report on the same questions."""
    fail_below_base: float | None = -5.0
    """Minimum score difference, in points of 100, of each weight above 0 to weight 0 in the same
    run. The default is not applied to the sample questions."""
    fail_slower: Positive | None = None
    """Maximum latency ratio to the last good report on the same questions."""


class SelftestRecipe(Recipe):
    """`selftest`: whether decoding and training are right, fast and fit on a node's GPUs."""

    job = "selftest"

    minutes: Positive | None = None
    """Maximum duration; checks that would end later are skipped. Default: 8, and 4 on a processor,
    where less than 5 means a short form with tiny models."""


def missing_trackers(recipe: Recipe) -> list[Tracker]:
    """The trackers of `report_to` that are not installed here."""
    names = recipe.report_to if isinstance(recipe, TrainRecipe) else ()
    return [name for name in names if importlib.util.find_spec(name) is None]


def data_names(recipe: Recipe) -> dict[str, str]:
    """The data that a recipe names, by key; keys that are not set are left out."""
    named = {key: getattr(recipe, key) for key in recipe.data_keys}
    return {key: name for key, name in named.items() if isinstance(name, str)}


RECIPES: Mapping[str, type[Recipe]] = {
    kind.job: kind for kind in (BenchmarkRecipe, PairsRecipe, SelftestRecipe, TrainRecipe)
}

R = TypeVar("R", bound=Recipe)


def load_recipe(kind: type[R], *overrides: Mapping[str, Any]) -> R:
    """The recipe of one run: `jobs/<job>.yaml`, overridden by each of `overrides` in turn.

    A process calls this once, at its entry point, and passes the result on.
    """
    values = load_job(kind.job).recipe
    for override in overrides:
        values = merge(values, override)
    return validate_recipe(kind, values)


def resolve_recipe(kind: type[R], *, file: Path | None, overrides: Sequence[str]) -> R:
    """The recipe of this process: a recipe file, then `TITA_RECIPE`, then `--set` options."""
    variable = parse_recipe_variable(settings().recipe)
    return load_recipe(kind, read_recipe_file(file), variable, parse_overrides(overrides))


def validate_recipe(kind: type[R], values: Mapping[str, Any]) -> R:
    """`values` as a recipe of the given type.

    Raises:
        TitaError: an unknown key (with the nearest known one), or an invalid value.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _first_mistake(kind, error) from None


def _first_mistake(kind: type[Recipe], error: ValidationError) -> TitaError:
    first, where = error.errors(include_url=False)[0], f"recipe of {kind.job}"
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        known = _known_keys(kind, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"
        return TitaError(f"unknown key {key!r}", where=where, remedy=remedy)
    hint = f"give --set {key}=..." if first["type"] == "missing" else None
    if first["type"] == "string_type" and isinstance(first["input"], int | float):
        hint = f"quote text: --set {key}='\"{json.dumps(first['input'])}\"'"
    return TitaError(f"{key}: {first['msg'].lower()}", where=where, remedy=hint)


def _known_keys(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        field = kind.model_fields.get(part)
        inner = (field.annotation, *get_args(field.annotation)) if field else ()
        kind = next((k for k in inner if isinstance(k, type) and issubclass(k, BaseModel)), kind)
    return list(kind.model_fields)
