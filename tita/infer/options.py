"""Options of one `tita infer` call: models, guidance, sampling. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tita.align.forms import REFERENCE_FORMS, UNGUIDED, Guidance
from tita.align.requests import Request, Sampling
from tita.errors import TitaError
from tita.recipes import ImageAspect
from tita.records import DEFAULT_WEIGHT, ContextTurn
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
    reference: str | None = None
    form: str = "tita"
    weight: float | None = None
    """`DEFAULT_WEIGHT` if a reward model is given, else 0."""
    plausibility: float = 0.0
    sampling: Sampling = field(default_factory=Sampling)
    dtype: str = "auto"
    device_map: str | None = None
    """Of the base model; reward and reference go to the first GPU if there is one."""
    image_aspect: ImageAspect = "auto"
    explain: bool = False

    def __post_init__(self) -> None:
        Guidance(weight=self.weight or 0.0, form=self.form, plausibility=self.plausibility)
        if self.reward is None:
            given = {
                "--weight": self.weight,
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
        if self.reward is None:
            return UNGUIDED
        weight = DEFAULT_WEIGHT if self.weight is None else self.weight
        return Guidance(weight=weight, form=self.form, plausibility=self.plausibility)

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
        sampling = self.sampling
        return {
            "base": self.base,
            "reward": self.reward,
            "reference": self.reference,
            "form": self.form,
            "weight": self.guidance.weight,
            "plausibility": self.plausibility,
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "repetition_penalty": sampling.repetition_penalty,
            "seed": sampling.seed,
            "stop": list(sampling.stops),
            "dtype": self.dtype,
            "image_aspect": self.image_aspect,
        }
