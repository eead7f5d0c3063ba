"""Loading the models of a server: where each came from, and how long it took."""

import re
import time
from dataclasses import dataclass

from tita.errors import TitaError
from tita.serve.schemas import Checkpoint
from tita.storage import Store, open_store
from tita.storage.pointer import read_pointer
from tita.terminal import say
from tita.vlm import VLM, load_vlm, model_digest

_RUN = re.compile(r"(?:^|/)runs/([^/]+)(?:/|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model, and where it came from."""

    vlm: VLM
    checkpoint: Checkpoint


def load(where: str, *, what: str, dtype: str = "auto", store: Store | None = None) -> Loaded:
    """Load a model and tell on standard error what it is and how long it took. Blocks.

    Args:
        where: a tree in the store, a pointer such as `reward/current`, a path, or a hub name.
        what: what to call it in these lines.
        dtype: as `load_vlm` takes it.
        store: the settings' one if not given.

    Raises:
        TitaError: nothing there, or no model.
    """
    say(f"tita serve: loading the {what} {where}")
    began = time.monotonic()
    # A pointer is followed once: it may move while gigabytes are read.
    source = _led_to(where, store=store or open_store())
    vlm = load_vlm(source, dtype=dtype, store=store)
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
    return Loaded(vlm=vlm, checkpoint=checkpoint)


def _led_to(where: str, *, store: Store) -> str:
    if where.startswith(("/", "./", "../", "~", "s3://")) or not where.endswith("/current"):
        return where
    try:
        pointer = read_pointer(store, where)
    except TitaError:
        return where  # a tree of that name; loading it tells what is wrong
    return pointer.target if pointer is not None else where
