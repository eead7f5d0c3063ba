"""Loads models that belong together: LoRA adapters of one model share its weights."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import cast

from tita.errors import TitaError
from tita.recipes import ImageAspect
from tita.storage import Store
from tita.storage.locate import digest_folder
from tita.vlm.adapters import (
    CONFIG_FILE,
    AdapterFiles,
    AdapterPool,
    adapter_aspect,
    is_adapter,
    read_adapter,
)
from tita.vlm.images import Aspect
from tita.vlm.loading import VLM, adapter_digest, hub_commit, locate_model


def load_role(
    role: str,
    where: str,
    *,
    loaded: dict[str, VLM],
    load: Callable[[str], VLM],
    store: Store | None = None,
    image_aspect: ImageAspect = "auto",
) -> VLM:
    """The model of a role.

    An adapter is added to the model that it was trained on, which is loaded if no other role has
    it. A quantized base model is not used for that: its rewards would be quantized, too.

    Args:
        role: name of the model; that of an adapter among those of its model.
        where: as of `load_vlm`, or the folder of an adapter.
        loaded: the models so far, by role; one that an adapter joins is replaced.
        load: loads a whole model.
        store: the store of trees.
        image_aspect: `auto` is the one that an adapter was trained with.

    Raises:
        TitaError: there is no such model, or an adapter does not fit its model.
    """
    source = locate_model(where, store=store, may_be_adapter=True)
    if not is_adapter(source):
        shared = _with_source(source, loaded)
        if role == "reference" and shared is not None and shared.adapters is not None:
            # The model before DPO is that of the adapters without any.
            return dataclasses.replace(shared, name=where, source=source, adapter=None)
        return load(where)
    files = read_adapter(source)
    _check_revision(files, store=store)
    try:
        found = locate_model(files.base, store=store)
        model = _with_source(found, loaded) or dataclasses.replace(load(files.base), source=found)
    except TitaError as error:
        if type(error) is not TitaError:
            raise
        raise TitaError(
            f"the model of the adapter, {files.base}: {error.what}",
            where=where,
            remedy="bring that model back, or name the merged model beside the adapter",
        ) from error
    pool = model.adapters or AdapterPool(model=model.model, source=found)
    pool.add(role, files)
    for other, vlm in loaded.items():
        if vlm.model is model.model:
            loaded[other] = dataclasses.replace(vlm, adapters=pool)
    recorded = adapter_aspect(source) if image_aspect == "auto" else None
    return dataclasses.replace(
        model,
        name=where,
        source=source,
        adapter=role,
        adapters=pool,
        image_aspect=cast(Aspect, recorded or model.image_aspect),
    )


def digest_of(where: str, *, store: Store | None = None) -> str:
    """Identity of a model or an adapter that is not loaded: as of `model_digest`.

    Raises:
        TitaError: there is no such model.
    """
    source = locate_model(where, store=store, may_be_adapter=True)
    if is_adapter(source):
        files = read_adapter(source)
        _check_revision(files, store=store)
        return adapter_digest(source, digest_of(files.base, store=store))
    if Path(source).is_dir():
        return digest_folder(Path(source))
    return f"{source}@{hub_commit(source)}"


def _check_revision(files: AdapterFiles, *, store: Store | None) -> None:
    """Check that the hub's model of an adapter is, by default, the one that it was trained on.

    Raises:
        TitaError: its training named another revision.
    """
    if files.revision is None or Path(base := locate_model(files.base, store=store)).is_dir():
        return
    default = hub_commit(base)
    if default != hub_commit(base, revision=files.revision):
        raise TitaError(
            f"the adapter was trained on revision {files.revision} of {base}, and models are "
            f"loaded from the default one, {default[:12]}",
            where=str(files.folder),
            remedy="download that revision to a folder, and name it as base_model_name_or_path in "
            f"the adapter's {CONFIG_FILE}",
        )


def _with_source(source: str, loaded: dict[str, VLM]) -> VLM | None:
    """A loaded model whose weights are those of `source`."""
    for vlm in loaded.values():
        own = vlm.source if vlm.adapters is None else vlm.adapters.source
        if own == source and not getattr(vlm.model, "is_quantized", False):
            return vlm
    return None
