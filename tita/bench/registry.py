"""Models by short name: endpoint, key variable and prices, from YAML; and the key itself."""

import os
from importlib import resources
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from tita.errors import TitaError
from tita.settings import settings


class TokenPrice(BaseModel):
    """What a million tokens cost."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: Annotated[float, Field(ge=0)]
    output: Annotated[float, Field(ge=0)]
    currency: Annotated[str, Field(min_length=1)]

    def cost(self, *, input_tokens: int, output_tokens: int) -> float:
        """In `currency`."""
        return (self.input * input_tokens + self.output * output_tokens) / 1e6


class RegisteredModel(BaseModel):
    """One model of one endpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    """What the endpoint calls the model."""
    base_url: Annotated[str, Field(pattern=r"^https?://")] | None = None
    key_env: str | None = None
    price: TokenPrice | None = None


class ModelRegistry(BaseModel):
    """All models known by a short name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: dict[str, RegisteredModel] = Field(default_factory=dict)

    def find(self, name: str) -> RegisteredModel:
        """The model of a short name or an id; an unknown one is its own id, without an endpoint."""
        if name in self.models:
            return self.models[name]
        by_id = (model for model in self.models.values() if model.id == name)
        return next(by_id, RegisteredModel(id=name))


def load_registry(file: Path | None = None) -> ModelRegistry:
    """Our own registry with the entries of `file`, or of `TITA_REGISTRY`'s, laid over it.

    Raises:
        TitaError: the file is not there or does not fit.
    """
    own = resources.files("tita.bench").joinpath("models.yaml").read_text(encoding="utf-8")
    registry = _parse(own, where="models.yaml")
    file = file or settings().registry
    if file is None:
        return registry
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TitaError(f"not text ({error.reason})", where=str(file)) from None
    return ModelRegistry(models={**registry.models, **_parse(text, where=str(file)).models})


def endpoint_of(model: RegisteredModel, *, name: str, base_url: str | None) -> str:
    """Where to ask: `base_url`, else the registry's entry.

    Raises:
        TitaError: neither says where, or it is no http address.
    """
    address = base_url or model.base_url
    if address is None:
        raise TitaError(
            f"no endpoint known for model {name!r}",
            remedy="give --base-url http://HOST:PORT/v1 or an entry in --registry",
        )
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise TitaError(f"{address!r} is no http address", where="--base-url")
    if parts.username or parts.password:
        raise TitaError(
            "holds a password", where="--base-url", remedy="give the key by a variable instead"
        )
    return address.rstrip("/")


def find_key(
    model: RegisteredModel, *, api_key: str | None, key_file: Path | None, base_url: str | None
) -> SecretStr | None:
    """The key to send: given, else from a file, else from the registry's variable; or none.

    The variable of a registry entry goes to that entry's own address only, so a key never travels
    to wherever `--base-url` points.

    Raises:
        TitaError: the key file is empty, or the key has characters that no header can carry.
    """
    key = api_key or None
    if key is None and key_file is not None:
        key = key_file.read_text(encoding="utf-8", errors="replace").strip()
        if not key:
            raise TitaError("no key in it", where=str(key_file))
    own_address = base_url is None or base_url.rstrip("/") == (model.base_url or "").rstrip("/")
    if key is None and model.key_env and own_address:
        key = os.environ.get(model.key_env)
    if not key:
        return None
    if not key.isascii() or not key.isprintable():
        raise TitaError("the key has characters that no header can carry", remedy="copy it again")
    return SecretStr(key)


def _parse(text: str, *, where: str) -> ModelRegistry:
    try:
        return ModelRegistry.model_validate(yaml.safe_load(text) or {})
    except yaml.YAMLError as error:
        raise TitaError(f"not YAML ({error})", where=where) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise TitaError(
            f"{key}: {first['msg'].lower()}", where=where, remedy="see tita/bench/models.yaml"
        ) from None
