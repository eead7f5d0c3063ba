"""Options of one `tita infer` call: models, guidance, sampling. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tita.align.forms import REFERENCE_FORMS, VIEW_FORMS, Guidance
from tita.align.requests import Request, Sampling
from tita.engine.engine_options import EngineName, VllmOptions
from tita.errors import TitaError
from tita.recipes import ImageAspect
from tita.records import ContextTurn
from tita.vlm.images import Picture
from tita.vlm.prompts import to_turns


@dataclass(frozen=True, slots=True, kw_only=True)
class InferOptions:
    """The same for all questions of a call.

    Raises:
        TitaError: a value is out of range, or two options contradict each other.
    """

    base: str
    reward: str | None = None
    rewards: Mapping[str, str] = field(default_factory=dict)
    """Several reward models by name, instead of `reward`."""
    reference: str | None = None
    form: str = "tita"
    weight: float | None = None
    """The form's default if not given; 0 if it needs a reward model and none is given."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """By reward model, instead of `weight`."""
    plausibility: float | None = None
    """The form's default if not given."""
    noise_step: int | None = None
    """Of the forms `vcd` and `tita_vcd`; their default if not given."""
    contrast: float | None = None
    """Of the form `tita_vcd`; its default if not given."""
    text: str = ""
    """Of the form `cfg`."""
    sampling: Sampling = field(default_factory=Sampling)
    dtype: str = "auto"
    device_map: str | None = None
    """Of the base model; reward and reference go to the first GPU if there is one."""
    image_aspect: ImageAspect = "auto"
    explain: bool = False
    engine: EngineName = "transformers"
    """The engine that runs the models."""
    vllm: VllmOptions = field(default_factory=VllmOptions)
    """Options of vLLM, if that is the engine."""

    def __post_init__(self) -> None:
        guidance = self._given
        if self.all_rewards:
            guidance.among(tuple(self.all_rewards)).reward_weights(tuple(self.all_rewards))
        if not self.all_rewards and guidance.uses_rewards:
            given = {
                "--weight": self.weight or self.weights,
                "--reference": self.reference,
                "--plausibility": self.plausibility,
                f"--form {self.form}": self.form != "tita",
            }
            option = next((option for option, value in given.items() if value), None)
            if option is not None:
                raise TitaError(f"{option} without --reward", remedy="give --reward too")
        elif self.form in REFERENCE_FORMS and self.reference is None:
            raise TitaError(
                f"--form {self.form} without --reference",
                remedy="give the reward model as it was before DPO",
            )
        elif self.form not in REFERENCE_FORMS and self.reference is not None:
            raise TitaError(
                f"--reference with --form {self.form}, which uses no reference",
                remedy="give --form dpo, or leave --reference out",
            )
        if self.engine == "vllm" and self.device_map:
            raise TitaError("--device-map with --engine vllm", remedy="give --tensor-parallel-size")
        if self.engine == "vllm" and self.form in VIEW_FORMS:
            raise TitaError(
                f"--form {self.form} with --engine vllm, which does not run the base model on a "
                "second view",
                remedy="choose another form, or --engine transformers",
            )
        sampling = self.sampling
        if not sampling.temperature and (sampling.top_p < 1 or sampling.top_k):
            option = "--top-k" if sampling.top_k else "--top-p"
            raise TitaError(
                f"{option} without --temperature, which is 0: greedy",
                remedy="give --temperature, such as 0.7",
            )

    @property
    def guidance(self) -> Guidance:
        """The guidance of each request."""
        return self._given.among(tuple(self.all_rewards))

    @property
    def _given(self) -> Guidance:
        return Guidance.of(
            form=self.form, weight=self.weight, weights=self.weights,
            plausibility=self.plausibility, noise_step=self.noise_step, contrast=self.contrast,
            text=self.text,
        )  # fmt: skip

    @property
    def all_rewards(self) -> dict[str, str]:
        """The reward models by name; one that was given without is called `reward`."""
        return ({"reward": self.reward} if self.reward else {}) | dict(self.rewards)

    def request(
        self, question: str, images: Sequence[Picture], *, context: Sequence[ContextTurn] = ()
    ) -> Request:
        """A question with the turns before it as a request to the engine."""
        return Request(
            turns=to_turns(context, question, images),
            guidance=self.guidance,
            sampling=self.sampling,
            explain=self.explain,
        )

    def describe(self) -> dict[str, Any]:
        """What an answer depends on beside its question, as written in every line of a file."""
        sampling, guidance = self.sampling, self.guidance
        several = {"rewards": dict(self.rewards), "weights": dict(guidance.weights)}
        return {
            "base": self.base,
            "reward": self.reward,
            "reference": self.reference,
            "form": self.form,
            "weight": guidance.weight,
            **(several if self.rewards else {}),
            **({"text": self.text} if self.text else {}),
            **({"noise_step": self.noise_step} if self.noise_step is not None else {}),
            **({"contrast": self.contrast} if self.contrast is not None else {}),
            "plausibility": guidance.plausibility,
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "repetition_penalty": sampling.repetition_penalty,
            "seed": sampling.seed,
            "stop": list(sampling.stops),
            "dtype": self.dtype,
            "image_aspect": self.image_aspect,
            # Left out for the default engine: files from before there were two can be resumed.
            **({"engine": self.engine} if self.engine != "transformers" else {}),
        }
