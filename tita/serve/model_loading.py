"""Loads the models of a server and records where each came from."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transformers import BitsAndBytesConfig

from tita.engine.start import require_engine
from tita.errors import TitaError
from tita.gang.gpus import require_gpus
from tita.records import loaded_model_line
from tita.serve.schemas import Checkpoint
from tita.serve.serve_options import LoadOptions, Quantization
from tita.settings import settings
from tita.storage import Store, open_store
from tita.storage.locate import read_pointer
from tita.terminal import say
from tita.vllm_plugin.outline import load_outline, saved_dtype
from tita.vlm.loading import VLM, Models, load_vlm, model_digest
from tita.vlm.model_set import load_role

_RUN = re.compile(r"(?:^|/)runs/([^/]+)(?:/|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModels:
    """The models of a server, and the origin of each."""

    models: Models
    base: Checkpoint
    rewards: Mapping[str, Checkpoint] = field(default_factory=dict)
    """By name."""
    reference: Checkpoint | None = None


def load_models(options: LoadOptions, *, store: Store | None = None) -> LoadedModels:
    """Load the models from `store`, by default the settings', and report each. Blocks.

    Raises:
        TitaError: a model is missing or cannot be loaded.
        NoDevice: this pod holds GPUs, and none is usable.
    """
    require_gpus(settings())
    store = store or open_store()
    names = {"base": options.base} | options.all_rewards
    if options.reference:
        names["reference"] = options.reference
    vlms: dict[str, VLM] = {}
    checkpoints: dict[str, Checkpoint] = {}
    require_engine(options.engine)
    for role, name in names.items():
        if options.engine == "vllm":
            vlms[role], checkpoints[role] = _outline(
                name, role=role, loaded=vlms, store=store, options=options
            )
        else:
            vlms[role], checkpoints[role] = _load(
                name, role=role, loaded=vlms, store=store, options=options
            )
    return LoadedModels(
        models=Models(
            vlms["base"],
            vlms.get("reward"),
            vlms.get("reference"),
            more={role: vlms[role] for role in options.rewards if role != "reward"},
        ),
        base=checkpoints["base"],
        rewards={role: checkpoints[role] for role in options.all_rewards},
        reference=checkpoints.get("reference"),
    )


def _outline(
    name: str, *, role: str, loaded: dict[str, VLM], store: Store, options: LoadOptions
) -> tuple[VLM, Checkpoint]:
    """A model whose weights vLLM loads."""
    source = _resolve_pointer(name, store=store)
    vlm = load_role(
        role,
        source,
        loaded=loaded,
        load=partial(load_outline, store=store, image_aspect=options.image_aspect),
        store=store,
        image_aspect=options.image_aspect,
    )
    digest = model_digest(vlm, store=store)
    say(loaded_model_line(role, source, f"for vLLM{_of_adapter(vlm)}, digest {digest[:12]}"))
    # vLLM runs all models in one dtype, by default that of the base.
    base = loaded.get("base", vlm).model.config
    dtype = saved_dtype(base) if options.dtype == "auto" else options.dtype
    return vlm, _checkpoint(name, source, vlm, digest=digest, dtype=dtype, quantization=None)


def _load(
    name: str, *, role: str, loaded: dict[str, VLM], store: Store, options: LoadOptions
) -> tuple[VLM, Checkpoint]:
    say(f"tita serve: loading the {role} model {name}")
    began = time.monotonic()
    # A pointer is resolved once: it may move while the model is read.
    source = _resolve_pointer(name, store=store)
    how: dict[str, Any] = {"dtype": options.dtype, "image_aspect": options.image_aspect}
    quantization = options.quantization if role == "base" else None
    if role == "base":
        how["device_map"] = options.device_map
    if quantization is not None:
        how["quantization"] = BitsAndBytesConfig(**{f"load_in_{quantization}": True})
    vlm = load_role(
        role,
        source,
        loaded=loaded,
        load=lambda where: load_vlm(where, store=store, **how),
        store=store,
        image_aspect=options.image_aspect,
    )
    load_s = time.monotonic() - began
    digest = model_digest(vlm, store=store)
    digest_s = time.monotonic() - began - load_s
    details = (
        f"{vlm.num_parameters / 1e6:,.1f} million parameters{_of_adapter(vlm)} on {vlm.device}, "
        f"loaded in {load_s:.1f} s, digest {digest[:12]} in {digest_s:.1f} s"
    )
    say(loaded_model_line(role, source, details))
    dtype = str(vlm.model.dtype)
    checkpoint = _checkpoint(
        name, source, vlm, digest=digest, dtype=dtype, quantization=quantization
    )
    return vlm, checkpoint


def _of_adapter(vlm: VLM) -> str:
    if vlm.adapter is None or vlm.adapters is None:
        return ""
    return f" of an adapter for {vlm.adapters.files[vlm.adapter].base}"


def _checkpoint(
    name: str,
    source: str,
    vlm: VLM,
    *,
    digest: str,
    dtype: str,
    quantization: Quantization | None,
) -> Checkpoint:
    run = _RUN.search(source)
    return Checkpoint(
        name=name,
        source=source,
        sha256=digest,
        run=None if run is None else run[1],
        dtype=dtype.removeprefix("torch."),
        quantization=quantization,
        image_aspect=vlm.image_aspect,
        adapter_of=None
        if vlm.adapter is None or vlm.adapters is None
        else vlm.adapters.files[vlm.adapter].base,
    )


def _resolve_pointer(name: str, *, store: Store) -> str:
    if name.startswith(("/", "./", "../", "~", "s3://")) or not name.endswith("/current"):
        return name
    try:
        pointer = read_pointer(store, name)
    except TitaError:
        return name  # it may be a tree; loading it reports the error
    return pointer.target if pointer is not None else name
