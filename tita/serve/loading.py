"""Loading the models of a server: where each came from, and how long it took."""

import re
import time
from dataclasses import dataclass
from typing import Any, Literal

from tita.align.requests import REFERENCE_FORMS, check_form
from tita.errors import TitaError
from tita.recipes import ImageAspect
from tita.serve.schemas import Checkpoint
from tita.storage import Store, open_store
from tita.storage.locate import read_pointer
from tita.terminal import say
from tita.vlm import VLM, Models, load_vlm, model_digest

_RUN = re.compile(r"(?:^|/)runs/([^/]+)(?:/|$)")


Quantization = Literal["8bit", "4bit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model, and where it came from."""

    vlm: VLM
    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModels:
    """What a server answers with."""

    base: LoadedModel
    reward: LoadedModel | None = None
    reference: LoadedModel | None = None

    @property
    def models(self) -> Models:
        """As the engine takes them."""
        reward, reference = (
            None if each is None else each.vlm for each in (self.reward, self.reference)
        )
        return Models(self.base.vlm, reward, reference)

    @property
    def checkpoints(self) -> tuple[Checkpoint, Checkpoint | None, Checkpoint | None]:
        """Of base, reward and reference."""
        reward, reference = (
            None if each is None else each.checkpoint for each in (self.reward, self.reference)
        )
        return self.base.checkpoint, reward, reference


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """Which models a server is to answer with: trees in the store, pointers, paths or hub names.

    Raises:
        TitaError: two of these contradict each other.
    """

    base: str
    reward: str | None = None
    reference: str | None = None
    """The reward model before DPO, for the forms that compare with it."""
    form: str = "tita"
    """Guidance form of requests that name none: it has to be possible with these models."""
    dtype: str = "auto"
    device_map: str | None = None
    """How the base is spread; the others go to the first GPU if there is one."""
    quantization: Quantization | None = None
    """Of the base's weights, by bitsandbytes; the others are small."""
    image_aspect: ImageAspect = "auto"
    """How each of them is shown images."""

    def __post_init__(self) -> None:
        if check_form(self.form) in REFERENCE_FORMS and not self.reference:
            raise TitaError(
                f"--form {self.form} without --reference",
                remedy="give the reward model as it was before DPO",
            )
        if self.reference and not self.reward:
            raise TitaError("--reference without --reward", remedy="give --reward, too")

    def load(self, *, store: Store | None = None) -> LoadedModels:
        """Load them and tell on standard error what they are and how long it took. Blocks.

        Args:
            store: the settings' one if not given.

        Raises:
            TitaError: nothing there, or no model.
        """
        how: dict[str, Any] = {
            "dtype": self.dtype,
            "image_aspect": self.image_aspect,
            "store": store,
        }
        base = load(
            self.base,
            what="base model",
            device_map=self.device_map,
            quantization=self._quantization_config(),
            **how,
        )
        reward = load(self.reward, what="reward model", **how) if self.reward else None
        reference = load(self.reference, what="reference model", **how) if self.reference else None
        return LoadedModels(base=base, reward=reward, reference=reference)

    def _quantization_config(self) -> Any:
        if self.quantization is None:
            return None
        from transformers import BitsAndBytesConfig

        # `load_in_8bit` and `load_in_4bit`, as LLaVA's own worker offers them.
        options: dict[str, Any] = {f"load_in_{self.quantization}": True}
        return BitsAndBytesConfig(**options)


def load(
    where: str,
    *,
    what: str,
    dtype: str = "auto",
    device_map: str | None = None,
    quantization: Any = None,
    image_aspect: ImageAspect = "auto",
    store: Store | None = None,
) -> LoadedModel:
    """Load a model and tell on standard error what it is and how long it took. Blocks.

    Args:
        where: a tree in the store, a pointer such as `reward/current`, a path, or a hub name.
        what: what to call it in these lines.
        dtype: as `load_vlm` takes it, like the next three.
        device_map: how it is spread over devices.
        quantization: a transformers quantization config.
        image_aspect: how it is shown images.
        store: the settings' one if not given.

    Raises:
        TitaError: nothing there, or no model.
    """
    say(f"tita serve: loading the {what} {where}")
    began = time.monotonic()
    # A pointer is followed once: it may move while gigabytes are read.
    source = _led_to(where, store=store or open_store())
    vlm = load_vlm(
        source,
        dtype=dtype,
        device_map=device_map,
        quantization=quantization,
        image_aspect=image_aspect,
        store=store,
    )
    loaded_s = time.monotonic() - began
    digest = model_digest(vlm, store=store)
    run = _RUN.search(source)
    num_millions = vlm.model.num_parameters() / 1e6
    say(
        f"tita serve: {what} {source}: {num_millions:,.1f} million parameters on {vlm.device} "
        f"in {loaded_s:.1f} s, digest {digest[:12]} in {time.monotonic() - began - loaded_s:.1f} s"
    )
    checkpoint = Checkpoint(
        name=where, source=source, sha256=digest, run=run[1] if run is not None else None
    )
    return LoadedModel(vlm=vlm, checkpoint=checkpoint)


def _led_to(where: str, *, store: Store) -> str:
    if where.startswith(("/", "./", "../", "~", "s3://")) or not where.endswith("/current"):
        return where
    try:
        pointer = read_pointer(store, where)
    except TitaError:
        return where  # a tree of that name; loading it tells what is wrong
    return pointer.target if pointer is not None else where
