"""Model registry: short names for models, with endpoint, API key variable and token prices."""

import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, Field, SecretStr, ValidationError

from tita.errors import TitaError
from tita.settings import settings


class TokenPrice(BaseModel, extra="forbid", frozen=True):
    """Price per million tokens."""

    input: Annotated[float, Field(ge=0)]
    output: Annotated[float, Field(ge=0)]
    currency: Annotated[str, Field(min_length=1)]


class RegisteredModel(BaseModel, extra="forbid", frozen=True):
    """A registry entry: one model at one endpoint."""

    id: str
    """The model id that is sent to the endpoint."""
    base_url: Annotated[str, Field(pattern=r"^https?://")] | None = None
    key_env: str | None = None
    """Environment variable that holds the API key."""
    price: TokenPrice | None = None


class ModelRegistry(BaseModel, extra="forbid", frozen=True):
    """Registry entries by short name."""

    models: dict[str, RegisteredModel] = Field(default_factory=dict)

    def find(self, name: str) -> RegisteredModel:
        """The entry with this short name or model id; an unknown name becomes a bare model id."""
        if name in self.models:
            return self.models[name]
        by_id = (model for model in self.models.values() if model.id == name)
        return next(by_id, RegisteredModel(id=name))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEndpoint:
    """A model, the endpoint that serves it, and the API key to send."""

    name: str
    """Model name in the results file."""
    model: RegisteredModel
    base_url: str
    """Base URL up to and including `/v1`."""
    key: SecretStr | None = None


def load_registry(file: Path | None = None) -> ModelRegistry:
    """The built-in registry, overridden by the entries of `file` or else of `TITA_REGISTRY`.

    Raises:
        TitaError: the file does not fit the registry's schema.
    """
    builtin = resources.files("tita.bench").joinpath("models.yaml").read_text(encoding="utf-8")
    registry = _parse(builtin, where="models.yaml")
    file = file or settings().registry
    if file is None:
        return registry
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TitaError(f"not a text file ({error.reason})", where=str(file)) from None
    return ModelRegistry(models={**registry.models, **_parse(text, where=str(file)).models})


def resolve_endpoint(
    name: str,
    *,
    base_url: str | None = None,
    api_key: str | None = None,
    key_file: Path | None = None,
    registry: Path | None = None,
) -> ModelEndpoint:
    """Look up a model by short name or id; `base_url`, `api_key` and `key_file` override its entry.

    Raises:
        TitaError: no endpoint is known, its URL is not valid, or the key cannot be used.
    """
    model = load_registry(registry).find(name)
    return ModelEndpoint(
        name=name,
        model=model,
        base_url=_endpoint_url(model, name=name, base_url=base_url),
        key=_find_key(model, api_key=api_key, key_file=key_file, base_url=base_url),
    )


def _endpoint_url(model: RegisteredModel, *, name: str, base_url: str | None) -> str:
    url = base_url or model.base_url
    if url is None:
        raise TitaError(
            f"no endpoint known for model {name!r}",
            remedy="give --base-url http://HOST:PORT/v1, or add the model to --registry",
        )
    try:
        parts = urlsplit(url)
        is_http = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # such as an IPv6 address without its bracket
        is_http = False
    if not is_http:
        raise TitaError("not an HTTP URL", where="--base-url", remedy="give http://HOST:PORT/v1")
    if parts.username or parts.password:
        raise TitaError(
            "the URL contains a password",
            where="--base-url",
            remedy="give the key by --key-file or an environment variable",
        )
    return url.rstrip("/")


def _find_key(
    model: RegisteredModel, *, api_key: str | None, key_file: Path | None, base_url: str | None
) -> SecretStr | None:
    """The API key: `api_key`, else the content of `key_file`, else the entry's variable.

    None for an endpoint that has no variable in the registry.

    The entry's variable is sent to the entry's own URL only: `--base-url` cannot redirect it.
    """
    key = api_key or None
    if key is None and key_file is not None:
        key = key_file.read_text(encoding="utf-8", errors="replace").strip()
        if not key:
            raise TitaError("the key file is empty", where=str(key_file))
    is_own_url = base_url is None or base_url.rstrip("/") == (model.base_url or "").rstrip("/")
    if key is None and model.key_env and is_own_url:
        key = os.environ.get(model.key_env)
    if not key:
        if model.key_env and is_own_url:
            raise TitaError(
                f"no API key for {model.id}",
                remedy=f"set {model.key_env}, or give --api-key or --key-file",
            )
        return None
    if not key.isascii() or not key.isprintable():
        raise TitaError(
            "the API key has characters that an HTTP header cannot carry",
            remedy="copy the key again",
        )
    return SecretStr(key)


def _parse(text: str, *, where: str) -> ModelRegistry:
    try:
        return ModelRegistry.model_validate(yaml.safe_load(text) or {})
    except yaml.YAMLError as error:
        raise TitaError(f"not valid YAML ({error})", where=where) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise TitaError(
            f"{key}: {first['msg'].lower()}", where=where, remedy="see tita/bench/models.yaml"
        ) from None
