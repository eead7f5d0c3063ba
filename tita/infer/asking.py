"""What `tita infer` is to do: which models, how strongly guided, how tokens are chosen."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tita.align import Engine, Guidance, Request, Sampling
from tita.align.requests import REFERENCE_FORMS, UNGUIDED
from tita.errors import TitaError
from tita.recipes import ImageAspect
from tita.records import DEFAULT_WEIGHT
from tita.vlm import Models, Picture, load_vlm


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """Models, guidance and sampling: what is the same for all questions of a call.

    Raises:
        TitaError: two of them contradict each other.
    """

    base: str
    reward: str | None = None
    reference: str | None = None
    form: str = "tita"
    weight: float | None = None
    """The default one where a reward model is given, else 0."""
    plausibility: float = 0.0
    sampling: Sampling = field(default_factory=Sampling)
    dtype: str = "auto"
    device_map: str | None = None
    """How the base is spread; reward and reference go to the first GPU if there is one."""
    image_aspect: ImageAspect = "auto"
    """How each of the models is shown images."""
    explain: bool = False

    def __post_init__(self) -> None:
        Guidance(weight=self.weight or 0.0, form=self.form, plausibility=self.plausibility)
        if self.reward is None:
            self._check_unguided()
        elif self.form in REFERENCE_FORMS and self.reference is None:
            raise TitaError(
                f"--form {self.form} without --reference",
                remedy="give the reward model as it was before DPO",
            )
        elif self.form not in REFERENCE_FORMS and self.reference is not None:
            raise TitaError(
                f"--reference beside --form {self.form}, which compares with none",
                remedy="give --form dpo, or leave --reference out",
            )
        sampling = self.sampling
        if not sampling.temperature and (sampling.top_p < 1 or sampling.top_k):
            option = "--top-k" if sampling.top_k else "--top-p"
            raise TitaError(
                f"{option} without --temperature, which is 0: greedy",
                remedy="give --temperature, such as 0.7",
            )

    def _check_unguided(self) -> None:
        given = {
            "--weight": self.weight,
            "--reference": self.reference,
            "--plausibility": self.plausibility,
        }
        for option, value in given.items():
            if value:
                raise TitaError(f"{option} without --reward", remedy="give --reward too")
        if self.form != "tita":
            raise TitaError(f"--form {self.form} without --reward", remedy="give --reward too")

    @property
    def guidance(self) -> Guidance:
        """The guidance of each request."""
        if self.reward is None:
            return UNGUIDED
        weight = DEFAULT_WEIGHT if self.weight is None else self.weight
        return Guidance(weight=weight, form=self.form, plausibility=self.plausibility)

    def request(self, question: str, images: Sequence[Picture]) -> Request:
        """A question as the engine takes it."""
        return Request(
            question=question,
            images=tuple(images),
            guidance=self.guidance,
            sampling=self.sampling,
            explain=self.explain,
        )

    def load(self) -> Engine:
        """The models, loaded. Blocks.

        Raises:
            TitaError: one of them cannot be loaded, or they are not of one family.
        """
        how: dict[str, Any] = {"dtype": self.dtype, "image_aspect": self.image_aspect}
        base = load_vlm(self.base, device_map=self.device_map, **how)
        reward, reference = (
            None if name is None else load_vlm(name, **how)
            for name in (self.reward, self.reference)
        )
        return Engine(Models(base, reward, reference))

    def describe(self) -> dict[str, Any]:
        """What an answer hangs on beside its question, as it stands in every line of a file."""
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
