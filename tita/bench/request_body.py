"""The body of a chat completions request: question, images, generation options and overrides."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from tita.bench.conditions import mask_secrets
from tita.bench.methods import Method
from tita.bench.questions import BenchmarkItem
from tita.bench.reasoning import Thinking
from tita.errors import TitaError
from tita.storage.image_shards import read_image
from tita.vlm.chat_messages import chat_messages, data_url

_FIXED = ("model", "messages")
"""Fields that options cannot omit, rename or set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldOverrides:
    """Changes to the fields of every request, for endpoints that do not take the usual ones."""

    omit: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    """New names by old name."""
    body: Mapping[str, Any] = field(default_factory=dict)
    """Additional fields; one with the name of a usual field replaces it."""

    def apply(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a request with the changes.

        Raises:
            TitaError: a field to omit or rename is not sent, or must not be changed.
        """
        for option, names in (("--omit", self.omit), ("--rename", self.rename)):
            for name in names:
                if name not in fields:
                    raise TitaError(
                        f"requests have no field {name!r}",
                        where=option,
                        remedy=f"choose from {', '.join(fields)}",
                    )
        for name in (*self.rename.values(), *self.body):
            if name in _FIXED:
                raise TitaError(f"{name!r} cannot be set", where="--rename or --body")
        kept = {self.rename.get(n, n): v for n, v in fields.items() if n not in self.omit}
        return kept | dict(self.body)

    def record(self) -> dict[str, Any]:
        """The changes as plain values for results files; empty without any."""
        changes = {"omit": list(self.omit), "rename": dict(self.rename), "body": dict(self.body)}
        return {name: mask_secrets(value) for name, value in changes.items() if value}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """How answers are generated; part of every score's protocol."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    weight: float | None = None
    """Guidance weight, for `tita serve`; None: not sent."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of several reward models by name, instead of `weight`."""
    fixed_length: bool = False
    """Ask for exactly `max_new_tokens` tokens, with vLLM's `ignore_eos` and `min_tokens`."""
    overrides: FieldOverrides = field(default_factory=FieldOverrides)
    thinking: Thinking = Thinking.AUTO
    method: Method | None = None
    """How it is answered, for `tita serve`, instead of `weight`."""

    def request_fields(self) -> dict[str, Any]:
        """The fields of a chat completions request other than `model` and `messages`.

        Raises:
            TitaError: the overrides do not fit the fields.
        """
        fields: dict[str, Any] = {
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.weight is not None:
            fields["guidance_weight"] = self.weight
        if self.weights:
            fields["guidance_weights"] = dict(self.weights)
        if self.fixed_length:
            fields |= {"ignore_eos": True, "min_tokens": self.max_new_tokens}
        if self.method is not None:
            fields |= self.method.fields()
            if not fields["stream"]:
                del fields["stream_options"]
        return self.overrides.apply(fields)

    def protocol(self) -> dict[str, Any]:
        """The options as fields of a results file; those with their default value are omitted."""
        request = self.overrides.record()
        if self.fixed_length:
            request["fixed_length"] = True
        weight, weights, temperature = self.weight, self.weights, self.temperature
        if self.method is not None:
            request |= self.method.record()
            weights = self.method.weights
            weight = None if weights else self.method.weight
            temperature = self.method.temperature(temperature)
        return {
            "weight": weight,
            **({"weights": dict(weights)} if weights else {}),
            "max_new_tokens": self.max_new_tokens,
            "temperature": temperature,
            **({"request": request} if request else {}),
            **({"thinking": str(self.thinking)} if self.thinking is not Thinking.AUTO else {}),
        }


def request_body(
    item: BenchmarkItem, *, model_id: str, images: Path, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """The body of the request for one question, after the turns in its context.

    Args:
        images: folder that image paths are relative to.
        fields: of `GenerationOptions.request_fields`.
    """
    urls = [_file_url(images / image) for image in item.images]
    messages = chat_messages(item.context, item.text, urls)
    return {"model": model_id, "messages": messages, **fields}


@lru_cache(maxsize=16)
def _file_url(path: Path) -> str:
    return data_url(read_image(path), name=path.name)
