"""LoRA adapters of one model: the files that PEFT writes, and how the rows of a forward use them.

PEFT mixes adapters in a batch, too: by a loop over them in every layer, and by hooks on all modules
that it sets and removes around every forward. At one token per step that is most of the time of a
small model. Here the adapters of a layer are one tensor, so that rows with different adapters take
two matrix products per layer however many adapters they have, and the model stays as it is.

Legend: S adapters in memory, R their rank, B rows of a batch, M adapters of these rows.
"""

import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tita.errors import TitaError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_ASPECT_FILE = "image_aspect.json"
_PREFIX = "base_model.model."
_MERGE = "merge it into its model with peft, and name that model"
_HARMLESS = frozenset((
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "target_modules", "task_type", "use_rslora",
))  # fmt: skip
"""Settings that are read here, that only matter in training, or that the weights show."""
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the weights of the model as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFiles:
    """A folder with a LoRA adapter, as PEFT saves one."""

    folder: Path
    base: str
    """The model that it belongs to, as its training named it."""
    revision: str | None
    """The revision of `base`, if that is a hub name and its training named one."""
    states: Mapping[str, tuple[int, int]]
    """Size and time of the last write of each file when it was read."""
    scales: Mapping[str, float]
    """By the path of a layer: factor of what the adapter adds."""
    shapes: Mapping[str, tuple[int, int, int]]
    """By the path of a layer: rank, inputs, outputs."""

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(rank for rank, _, _ in self.shapes.values())

    @property
    def num_parameters(self) -> int:
        return sum(rank * (ins + outs) for rank, ins, outs in self.shapes.values())

    def check_unchanged(self) -> None:
        """Check that the files are those that were read: weights are read when they are used.

        Raises:
            TitaError: one is missing, or was written to; digests and scores are of the old one.
        """
        for name, state in self.states.items():
            try:
                if _state_of(self.folder / name) == state:
                    continue
                what, remedy = f"{name} was replaced", "load the models again, or restore it"
            except OSError:
                what, remedy = f"{name} is missing", "restore its files"
            raise TitaError(
                f"the adapter cannot be read any more ({what})",
                where=str(self.folder),
                remedy=remedy,
            )


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (Path(folder) / CONFIG_FILE).is_file() and not (Path(folder) / "config.json").is_file()


def read_adapter(folder: str | Path) -> AdapterFiles:
    """The settings and shapes of an adapter; reads no weights.

    Raises:
        TitaError: the files are damaged, or it adds more to its model than low-rank products.
    """
    folder = Path(folder)
    try:
        states = {name: _state_of(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
        config = json.loads((folder / CONFIG_FILE).read_text())
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG_FILE} is no JSON object")
        with safe_open(folder / WEIGHTS_FILE, "pt") as weights:
            names = list(weights.keys())
            found = {name: tuple(weights.get_slice(name).get_shape()) for name in names}
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = f"give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
        raise TitaError(f"not an adapter ({reason})", where=str(folder), remedy=remedy) from None
    _check_settings(config, folder)
    shapes: dict[str, tuple[int, int, int]] = {}
    for name, shape in found.items():
        path = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        if name.endswith(".lora_B.weight") and name.replace(".lora_B.", ".lora_A.") in found:
            continue
        other = found.get(name.replace(".lora_A.", ".lora_B."), ())
        if name.endswith(".lora_A.weight") and shape[:1] == other[1:] and len(shape) == 2:
            shapes[path] = shape[0], shape[1], other[0]
        else:
            raise TitaError(
                f"the adapter has {name}, which is no low-rank product of a linear layer",
                where=str(folder),
                remedy=_MERGE,
            )
    if not shapes:
        raise TitaError("the adapter has no layers", where=str(folder), remedy="train it again")
    root, alpha = bool(config.get("use_rslora")), float(config["lora_alpha"])
    return AdapterFiles(
        folder=folder,
        base=str(config["base_model_name_or_path"]),
        revision=config.get("revision") or None,
        states=states,
        scales={
            path: alpha / (math.sqrt(rank) if root else rank)
            for path, (rank, _, _) in shapes.items()
        },
        shapes=shapes,
    )


def _state_of(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def write_adapter_aspect(folder: Path, aspect: str) -> None:
    """Record the aspect in which an adapter was trained to see images: `pad` or `keep`."""
    (folder / _ASPECT_FILE).write_text(json.dumps({"image_aspect": aspect}))


def adapter_aspect(folder: str | Path) -> str | None:
    """The aspect that was recorded with an adapter, if any."""
    path = Path(folder) / _ASPECT_FILE
    return str(json.loads(path.read_text())["image_aspect"]) if path.is_file() else None


def _check_settings(config: dict[str, Any], folder: Path) -> None:
    missing = [name for name in ("base_model_name_or_path", "lora_alpha") if not config.get(name)]
    if config.get("peft_type") != "LORA" or missing:
        what = f"its {missing[0]} is missing" if missing else f"type {config.get('peft_type')}"
        raise TitaError(f"not a LoRA adapter ({what})", where=str(folder), remedy=_MERGE)
    others = {
        name: value
        for name, value in config.items()
        if value and name not in _HARMLESS and (name, value) != ("bias", "none")
    }
    if config.get("alpha_pattern"):
        others["alpha_pattern"] = config["alpha_pattern"]
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        others["init_lora_weights"] = config["init_lora_weights"]
    for name, value in others.items():
        raise TitaError(
            f"the adapter has {name}={value}, and only plain LoRA is read",
            where=str(folder),
            remedy=_MERGE,
        )


@dataclass(frozen=True, slots=True)
class _Selection:
    """Which adapter each row of a forward has."""

    slots: tuple[int, ...]
    """M places in memory; one if all rows have the same adapter."""
    places: Tensor | None = None
    """[M] the slots, unless they are all there are, in order."""
    others: Tensor | None = None
    """[B, M * R]: whether a row has another adapter or none; None if all rows have the same."""


@dataclass(slots=True, eq=False)
class _Layer:
    """The adapters of one linear layer."""

    path: str
    down: Tensor
    """[S, R, inputs]"""
    up: Tensor
    """[S, R, outputs], scaled"""
    pool: "AdapterPool"

    def __call__(self, module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A forward hook: adds what the adapters of the rows add."""
        chosen = self.pool.selection
        if chosen is None:
            return output
        features = given[0].to(self.down)
        if chosen.others is None:
            (slot,) = chosen.slots
            down, up = self.down[slot], self.up[slot]
            low = features @ down.T
        else:
            others = chosen.others.to(self.down.device)
            if len(features) != len(others):
                raise TitaError(
                    f"layer {self.path} gets {len(features)} rows of {len(others)}",
                    remedy=_MERGE,
                )
            down, up = self.down, self.up
            if chosen.places is not None:
                places = chosen.places.to(down.device)
                down, up = down.index_select(0, places), up.index_select(0, places)
            down, up = down.flatten(0, 1), up.flatten(0, 1)
            # Set to zero, not multiplied by it: another adapter's product may have overflowed.
            others = others.view(len(others), *[1] * (features.dim() - 2), -1)
            low = (features @ down.T).masked_fill_(others, 0)
        if output.dtype == up.dtype and output.is_contiguous():
            output.flatten(0, -2).addmm_(low.flatten(0, -2), up)
            return output
        return output + (low @ up).to(output)


@dataclass(eq=False, kw_only=True)
class AdapterPool:
    """The adapters of one model. Those in memory are bounded; the least recently used are evicted.

    Not thread-safe. The model itself stays as it is: the layers get hooks when the first adapter is
    used, and without a selection they do nothing.
    """

    model: nn.Module
    source: str = ""
    """The local folder, or the hub name, from which the model was loaded."""
    digest: str = ""
    """Identity of the model without adapters, once it is known."""
    max_loaded: int = 16
    """Maximum number of adapters in memory."""
    files: dict[str, AdapterFiles] = field(default_factory=dict)
    """By name, all that can be used."""
    num_loads: int = 0
    """Adapters that were read from their files so far."""
    selection: _Selection | None = None
    """Of the forward that runs."""
    _layers: list[_Layer] = field(default_factory=list)
    _slots: OrderedDict[str, int] = field(default_factory=OrderedDict)
    """Place of each adapter in memory, the most recently used last."""
    _rank: int = 0
    _known: dict[tuple[str | None, ...], _Selection] = field(default_factory=dict)
    """The newest selection, by its rows."""
    _handles: list[Any] = field(default_factory=list)

    def add(self, name: str, files: AdapterFiles) -> None:
        """Make an adapter available; it is loaded when it is used.

        Raises:
            TitaError: the model has no such layers.
        """
        for path, (_, ins, outs) in files.shapes.items():
            try:
                layer: Any = self.model.get_submodule(path)
            except AttributeError:
                layer = None
            found = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
            if found != (ins, outs):
                what = "no such layer" if layer is None else f"{found[0]} to {found[1]}"
                raise TitaError(
                    f"the adapter changes {path}, {ins} to {outs} features; its model has {what}",
                    where=str(files.folder),
                    remedy=f"check that {files.base} is the model that it was trained on",
                )
        self.clear()
        self.files[name] = files

    def limit(self, max_loaded: int) -> None:
        """Set the maximum number of adapters in memory."""
        if max_loaded != self.max_loaded:
            self.clear()
            self.max_loaded = max_loaded

    def clear(self) -> None:
        """Free the memory of all adapters, which stay available."""
        self._layers.clear()
        self._slots.clear()
        self._known.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def capacity(self) -> int:
        """S: maximum number of adapters in one forward."""
        return min(self.max_loaded, len(self.files))

    @property
    def loaded(self) -> list[str]:
        """Names of those in memory, the most recently used last."""
        return [*self._slots]

    @property
    def num_bytes(self) -> int:
        """Memory of the adapters, bounded by `max_loaded`."""
        return sum(layer.down.nbytes + layer.up.nbytes for layer in self._layers)

    @contextmanager
    def selected(self, rows: Sequence[str | None]) -> Iterator[None]:
        """Give each row of the forwards in this context its adapter; None is the model alone.

        Where all rows have the same adapter, inputs of the layers may have any shape. Else their
        first dimension is that of the rows, so images are read with one adapter at a time.

        Raises:
            TitaError: an adapter cannot be read, or there are more than fit into memory.
        """
        self.selection = self._select(tuple(rows))
        try:
            yield
        finally:
            self.selection = None

    def _select(self, rows: tuple[str | None, ...]) -> _Selection | None:
        names = [name for name in dict.fromkeys(rows) if name is not None]
        for name in names:
            if name in self._slots:
                self._slots.move_to_end(name)
        if rows in self._known:
            return self._known[rows]
        self._known.clear()
        if not names:
            return None
        if len(names) > self.capacity:
            raise TitaError(
                f"{len(names)} adapters in one batch, and {self.capacity} may be in memory",
                remedy="raise the maximum number of adapters",
            )
        for name in names:
            if name not in self._slots:
                self._load(name, keep=names)
        slots = tuple(self._slots[name] for name in names)
        if len(names) == 1 and None not in rows:
            found = _Selection(slots)
        else:
            found = self._mixed(rows, slots)
        self._known[rows] = found
        return found

    def _mixed(self, rows: tuple[str | None, ...], slots: tuple[int, ...]) -> _Selection:
        everything = tuple(range(self.capacity))
        order = everything if set(slots) == set(everything) else slots
        device = self._layers[0].down.device
        own = [-1 if name is None else order.index(self._slots[name]) for name in rows]
        others = torch.ones(len(rows), len(order), dtype=torch.bool)
        for row, place in enumerate(own):
            if place >= 0:
                others[row, place] = False
        places = None if order == everything else torch.tensor(order, device=device)
        return _Selection(order, places, others.repeat_interleave(self._rank, 1).to(device))

    @torch.inference_mode()
    def _load(self, name: str, *, keep: Sequence[str]) -> None:
        """Read an adapter from its files, in the place of the least recently used one."""
        if not self._layers:
            self._allocate()
        files = self.files[name]
        free = set(range(self.capacity)) - set(self._slots.values())
        slot = min(free) if free else self._evict(keep)
        try:
            with safe_open(files.folder / WEIGHTS_FILE, "pt") as weights:
                for layer in self._layers:
                    layer.down[slot] = 0
                    layer.up[slot] = 0
                    if layer.path not in files.shapes:
                        continue
                    rank, scale = files.shapes[layer.path][0], files.scales[layer.path]
                    prefix = f"{_PREFIX}{layer.path}"
                    down = weights.get_tensor(f"{prefix}.lora_A.weight")
                    up = weights.get_tensor(f"{prefix}.lora_B.weight")
                    layer.down[slot, :rank].copy_(down)
                    layer.up[slot, :rank].copy_((up * scale).T)
                    if not (layer.down[slot].isfinite().all() and layer.up[slot].isfinite().all()):
                        # They would spoil the answers of all rows in the same forward.
                        raise TitaError(
                            f"the adapter's weights of {layer.path} are NaN or infinite",
                            where=str(files.folder),
                            remedy="train it again",
                        )
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise TitaError(
                f"the adapter cannot be read any more ({reason})",
                where=str(files.folder),
                remedy="restore its files",
            ) from None
        # Afterwards, because they may be replaced while they are read.
        files.check_unchanged()
        self._slots[name] = slot
        self.num_loads += 1

    def _evict(self, keep: Sequence[str]) -> int:
        oldest = next(name for name in self._slots if name not in keep)
        return self._slots.pop(oldest)

    def _allocate(self) -> None:
        self._rank = max(files.rank for files in self.files.values())
        shapes = {
            path: shape for files in self.files.values() for path, shape in files.shapes.items()
        }
        for path, (_, ins, outs) in shapes.items():
            module: Any = self.model.get_submodule(path)
            # A copy, if the layer is packed.
            weight = module.weight
            model: Any = self.model
            dtype = weight.dtype if weight.is_floating_point() else model.dtype
            down, up = (
                torch.zeros(self.capacity, self._rank, width, dtype=dtype, device=weight.device)
                for width in (ins, outs)
            )
            layer = _Layer(path, down, up, self)
            self._handles.append(module.register_forward_hook(layer))
            self._layers.append(layer)
