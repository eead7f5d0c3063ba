"""Loading vision-language models, from the store, a path, or a hub name."""

import dataclasses
import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub import hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import logging as transformers_logging

from tita.errors import HubUnavailable, TitaError
from tita.recipes import ImageAspect
from tita.records import check_reward_name
from tita.storage import Store, open_store, resolve
from tita.storage.locate import digest_folder, explicit_path
from tita.terminal import counted
from tita.vlm.adapters import CONFIG_FILE as ADAPTER_CONFIG_FILE
from tita.vlm.adapters import AdapterPool, is_adapter
from tita.vlm.images import Aspect, aspect_of
from tita.vlm.processors import load_processor

logger = logging.getLogger(__name__)

_REMEDY = "check the folder or the name"
_REMEDIES = (
    (
        "torchvision",
        "install the torchvision built for this torch, or none if the model needs none",
    ),
    ("custom code", "choose a model that is part of transformers; code of a checkpoint is not run"),
    ("recognize this architecture", "choose a model in the format of transformers, or update it"),
    ("backend tokenizer", "save tokenizer.json beside it, or pip install sentencepiece"),
    ("load image processor", "copy preprocessor_config.json from the model that it was made from"),
    ("load video processor", "copy preprocessor_config.json from the model that it was made from"),
    ("deserializing header", "download the file of weights again; with Git, git lfs pull"),
)
"""What to do about an error of transformers that contains a text."""
_NOT_APPLIED = (
    *("bad_words_ids", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"),
    *("sequence_bias", "suppress_tokens"),
)
"""Settings of `generation_config.json` that rule tokens out or force them."""
_PIP = re.compile(r"pip install (?:-U )?[\w.-]+")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class VLM:
    """A vision-language model, its processor, and the aspect in which it sees images."""

    name: str
    model: Any
    """A transformers `...ForConditionalGeneration`, in evaluation mode."""
    processor: Any
    image_aspect: Aspect
    """`pad` adds bars that make images square, as LLaVA-1.5 was trained; `keep` leaves them."""
    source: str = ""
    """The local folder, or the hub name, that `name` stood for when the model was loaded."""
    adapter: str | None = None
    """Its LoRA adapter among `adapters`; the model may be shared with others."""
    adapters: AdapterPool | None = None
    """The adapters of `model`."""

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        """Device of the inputs: with a device map, that of the first layer."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def num_parameters(self) -> int:
        """Of the adapter alone, if it is one."""
        if self.adapter is not None and self.adapters is not None:
            return self.adapters.files[self.adapter].num_parameters
        return int(self.model.num_parameters())

    @property
    def context_length(self) -> int:
        """Maximum number of tokens of prompt and answer together."""
        config = self.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 2**31)


@dataclass(frozen=True, slots=True)
class Models:
    """The loaded models of an engine.

    Raises:
        TitaError: the name of a reward model is not possible.
    """

    base: VLM
    """The frozen model that is steered."""
    reward: VLM | None = None
    """The model that steers, if there is one; `more` has several."""
    reference: VLM | None = None
    """The reward model before DPO, for the forms that need it."""
    more: Mapping[str, VLM] = field(default_factory=dict, kw_only=True)
    """Reward models by name."""

    def __post_init__(self) -> None:
        for name in self.more:
            check_reward_name(name)

    @property
    def rewards(self) -> dict[str, VLM]:
        """The reward models by name; `reward` is the name of the one that was given without."""
        return ({} if self.reward is None else {"reward": self.reward}) | dict(self.more)

    def by_role(self) -> dict[str, VLM]:
        """The models that are there, by role: base first, reward models by their names."""
        reference = {} if self.reference is None else {"reference": self.reference}
        return {"base": self.base} | self.rewards | reference


def load_vlm(
    where: str | Path,
    *,
    store: Store | None = None,
    dtype: str = "auto",
    device_map: Any = None,
    quantization: Any = None,
    image_aspect: ImageAspect = "auto",
) -> VLM:
    """Load model and processor for inference.

    Args:
        where: a tree in the store, a path, or a hub name `organisation/model`; a `Path` is a path.
        store: the store of the tree; that of the settings if not given.
        dtype: `auto` is the checkpoint's own; else `float32`, `bfloat16`, `float16`.
        device_map: as in transformers, e.g. `auto` to spread one model over several GPUs.
        quantization: a transformers quantization config.
        image_aspect: see `tita.vlm.images.aspect_of`.

    Raises:
        TitaError: there is nothing at `where`, or transformers cannot load it.
    """
    silence_transformers()
    where = explicit_path(where)
    source = locate_model(where, store=store)
    options = {"dtype": dtype, "device_map": device_map, "quantization_config": quantization}
    with translate_load_errors(where):
        processor = load_processor(source, where=where)
        given = {key: value for key, value in options.items() if value is not None}
        model = load_weights(source, where=where, **given)
    if device_map is None and torch.cuda.is_available():
        model = model.to("cuda")
    if ignored := [n for n in _NOT_APPLIED if getattr(model.generation_config, n, None)]:
        text = ", ".join(ignored)
        logger.warning("%s: its generation_config.json has %s, not applied here", where, text)
    aspect = aspect_of(model.config, wanted=image_aspect)
    return VLM(
        name=where, model=model.eval(), processor=processor, image_aspect=aspect, source=source
    )


def load_weights(source: str, *, where: str, **options: Any) -> Any:
    """A checkpoint's model with all of its weights.

    transformers gives weights that the files lack random values, and reads those that were
    quantized in a way that it does not know as if they were not.

    Args:
        source: folder or hub name for transformers.
        where: its name in errors.
        options: of `from_pretrained`.

    Raises:
        TitaError: weights are missing or of another shape, or quantized in an unknown way.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    quantized = getattr(config, "quantization_config", None)
    if isinstance(quantized, dict) and not AutoHfQuantizer.supports_quant_method(quantized):
        raise TitaError(
            f"quantized by {quantized['quant_method']!r}, which transformers does not know",
            where=where,
            remedy="name the model before it was quantized",
        )
    model, found = AutoModelForImageTextToText.from_pretrained(
        source,
        output_loading_info=True,
        # Those that do not fit are reported below, by name.
        ignore_mismatched_sizes=True,
        trust_remote_code=False,
        **options,
    )
    if missing := sorted(found["missing_keys"]):
        raise TitaError(
            f"its files lack {counted(len(missing), 'weight')} of the model, such as {missing[0]}",
            where=where,
            remedy="download or save the whole model again",
        )
    for name, saved, wanted in sorted(found["mismatched_keys"]):
        raise TitaError(
            f"{name} has the shape {list(saved)}, and its config.json asks for {list(wanted)}",
            where=where,
            remedy="save the model with its own config.json",
        )
    return model


@contextmanager
def translate_load_errors(where: str) -> Iterator[None]:
    """Turn any exception that transformers raises on a bad checkpoint into a `TitaError`.

    Out-of-memory errors pass unchanged.

    Raises:
        TitaError: loading failed.
    """
    try:
        yield
    except (MemoryError, TitaError):
        raise
    except Exception as error:
        # In a distributed run a RuntimeError may also be the loss of a peer.
        if isinstance(error, RuntimeError) and (
            "out of memory" in str(error)
            or (torch.distributed.is_available() and torch.distributed.is_initialized())
        ):
            raise
        logger.debug("loading %s failed", where, exc_info=True)
        # transformers wraps it; the hub's client does not.
        if any(isinstance(each, LocalEntryNotFoundError) for each in (error, error.__cause__)):
            raise _hub_error(where) from error
        cause: BaseException = error
        # transformers wraps the cause of a failed import in a general ImportError.
        while isinstance(cause, ImportError) and cause.__cause__ is not None:
            cause = cause.__cause__
        first_line = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        reason = shorten(first_line, 200, placeholder=" ...")
        remedy = _REMEDY
        if isinstance(cause, ImportError):
            command = _PIP.search(str(cause))
            remedy = "install what it needs" if command is None else command[0]
        for mark, known in _REMEDIES:
            if mark in str(cause).lower():
                remedy = known
                break
        raise TitaError(
            f"not a vision-language model that transformers can load ({reason})",
            where=where,
            remedy=remedy,
        ) from error


def _hub_error(where: str) -> TitaError:
    if is_offline_mode():
        return TitaError(
            "not in the local cache of the hub, and HF_HUB_OFFLINE forbids a download",
            where=where,
            remedy="unset HF_HUB_OFFLINE, or name a folder",
        )
    return HubUnavailable(
        f"neither a folder nor in the store, and the hub {ENDPOINT} does not answer",
        where=where,
        remedy="check the network, or name a folder",
    )


def silence_transformers() -> None:
    """Switch off the progress bars and warnings of transformers; errors stay."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # The hub's client prints its records itself.
    hub_logging.disable_propagation()


def locate_model(
    where: str | Path, *, store: Store | None = None, may_be_adapter: bool = False
) -> str:
    """The local folder of `where`, else `where` itself if it can be a hub name.

    Raises:
        TitaError: it is neither.
    """
    where = explicit_path(where)
    try:
        path = resolve(where, store=store or open_store())
    except TitaError:
        if _HUB_NAME.fullmatch(where) and not where.startswith((".", "~")):
            return where
        raise
    if is_adapter(path):
        if may_be_adapter:
            return str(Path(path))
        raise TitaError(
            "a LoRA adapter, and a whole model is needed here",
            where=str(path),
            remedy="name the model into which it was merged, which train-dpo writes beside it",
        )
    if not (path / "config.json").is_file():
        raise TitaError("no config.json in it", where=str(path), remedy="name a model's folder")
    if (path / ADAPTER_CONFIG_FILE).is_file():
        # transformers would add the adapter to the model, even if that has it already.
        raise TitaError(
            "a model and a LoRA adapter in one folder",
            where=str(path),
            remedy=f"move {ADAPTER_CONFIG_FILE} and the adapter's weights to another folder",
        )
    return str(Path(path))


def model_digest(vlm: VLM, *, store: Store | None = None) -> str:
    """Identity of the model: the digest of its files, or a hub model's name and commit.

    Of an adapter, that of its files and of the model that it belongs to.
    """
    source = vlm.source or locate_model(vlm.name, store=store)
    if (pool := vlm.adapters) is not None:
        if not pool.digest:
            # Once: the files of a model are many gigabytes, and its adapters may be many.
            whole = dataclasses.replace(vlm, source=pool.source, adapter=None, adapters=None)
            pool.digest = model_digest(whole, store=store)
        return pool.digest if vlm.adapter is None else adapter_digest(source, pool.digest)
    if Path(source).is_dir():
        return digest_folder(Path(source))
    return f"{source}@{loaded_commit(source)}"


def loaded_commit(name: str) -> str:
    """The commit of a hub model that was loaded here: that of the cache, not of the hub by now."""
    path = try_to_load_from_cache(name, "config.json")
    assert isinstance(path, str), name
    return Path(path).parent.name


def hub_commit(name: str, *, revision: str | None = None) -> str:
    """The commit of a revision of a hub model, by default of the one that is loaded; asks the hub.

    Raises:
        TitaError: there is no such model or revision, or the hub does not answer.
    """
    with translate_load_errors(name):
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent.name


def adapter_digest(folder: str, model: str) -> str:
    """Identity of an adapter on the model with a digest."""
    both = f"{digest_folder(Path(folder))} on {model}"
    return hashlib.sha256(both.encode()).hexdigest()
