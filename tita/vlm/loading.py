"""Loading a VLM with what belongs to it, from the store, a path, or a hub name."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tita.errors import TitaError
from tita.recipes import ImageAspect
from tita.storage import open_store, resolve
from tita.storage.manifest import describe
from tita.vlm.aspect import Aspect, aspect_of
from tita.vlm.processors import load_processor

if TYPE_CHECKING:
    import torch

    from tita.storage import Store

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class VLM:
    """A vision-language model, its processor, and how it wants its images."""

    name: str
    model: Any
    """A transformers `...ForConditionalGeneration`, in evaluation mode."""
    processor: Any
    image_aspect: Aspect
    """`pad` makes images square with bars, as LLaVA-1.5 was trained; `keep` passes them as is."""

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def device(self) -> "torch.device":
        """Where the inputs go: with a device map, the device of the first layer."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device


def load_vlm(
    where: str,
    *,
    store: "Store | None" = None,
    dtype: str = "auto",
    device_map: Any = None,
    quantization: Any = None,
    image_aspect: ImageAspect = "auto",
) -> VLM:
    """Load model and processor for inference.

    Args:
        where: a tree in the store, a path, or a hub name `organisation/model`.
        store: the store that `where` may be a tree of; the settings' one if not given.
        dtype: `auto` takes the checkpoint's own; else `float32`, `bfloat16`, `float16`.
        device_map: as transformers takes it, e.g. `auto` to spread one model over several GPUs.
        quantization: a transformers quantization config.
        image_aspect: see `tita.vlm.aspect_of`.

    Raises:
        TitaError: nothing there, or not a model that transformers can load.
    """
    from transformers import AutoModelForImageTextToText

    hush_transformers()
    source = locate_model(where, store=store)
    options = {"dtype": dtype, "device_map": device_map, "quantization_config": quantization}
    with telling_load_errors(where):
        processor = load_processor(source, where=where)
        model = AutoModelForImageTextToText.from_pretrained(
            source, **{key: value for key, value in options.items() if value is not None}
        )
    if device_map is None and _cuda():
        model = model.to("cuda")
    aspect = aspect_of(model.config, wanted=image_aspect)
    return VLM(name=where, model=model.eval(), processor=processor, image_aspect=aspect)


@contextmanager
def telling_load_errors(where: str) -> Iterator[None]:
    """Whatever is wrong with a checkpoint comes out of transformers as any of a dozen types.

    Raises:
        TitaError: in place of any of them; memory that ran out stays what it is.
    """
    try:
        yield
    except (MemoryError, TitaError):
        raise
    except Exception as error:
        # Among several ranks a RuntimeError is as likely the loss of a peer as a bad checkpoint.
        if isinstance(error, RuntimeError) and (_is_gang() or "out of memory" in str(error)):
            raise
        logger.debug("loading %s failed", where, exc_info=True)
        cause = _cause(error)
        raise TitaError(
            f"not a vision-language model that transformers can load ({_first_line(cause)})",
            where=where,
            remedy=_remedy(cause),
        ) from error


def hush_transformers() -> None:
    """Keep transformers' progress bars and hints from drowning our own lines; errors stay."""
    from transformers.utils import logging as their_logging

    their_logging.set_verbosity_error()
    their_logging.disable_progress_bar()


def locate_model(where: str, *, store: "Store | None" = None) -> str:
    """A local folder for `where`, else `where` itself if it can be a hub name.

    Raises:
        TitaError: neither.
    """
    try:
        path = resolve(where, store=store or open_store())
    except TitaError:
        if _HUB_NAME.fullmatch(where) and not where.startswith((".", "~")):
            return where
        raise
    if not (path / "config.json").is_file():
        raise TitaError("no config.json in it", where=str(path), remedy="name a model's folder")
    return str(Path(path))


def _cause(error: BaseException) -> BaseException:
    """transformers says of any import that failed that it failed, and why only in its cause."""
    while isinstance(error, ImportError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _remedy(error: BaseException) -> str:
    if "torchvision" in str(error).lower():
        return "install the torchvision built for this torch, or none if the model needs none"
    if isinstance(error, ImportError):
        return "install what it needs"
    return "check the folder or the name"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _is_gang() -> bool:
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def model_digest(vlm: VLM, *, store: "Store | None" = None) -> str:
    """What tells this model from any other: its files' digest, or a hub model's name and commit."""
    source = locate_model(vlm.name, store=store)
    if Path(source).is_dir():
        return describe(Path(source)).digest
    return f"{source}@{vlm.model.config._commit_hash}"
