"""The API keys that the server accepts, and the default guidance weights of each."""

import hmac
import logging
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType

from tita.errors import TitaError
from tita.records import ApiKey, parse_api_keys
from tita.settings import settings

logger = logging.getLogger(__name__)

Weights = Mapping[str, float]
"""By reward model."""

KEY_WEIGHTS: ContextVar[Weights] = ContextVar("KEY_WEIGHTS", default=MappingProxyType({}))
"""Default weights of the API key of the request that is answered; empty if it has none."""


def _accept(_: Weights) -> None:
    pass


class APIKeys:
    """The API keys that the server accepts; without keys the server is open.

    A file of keys is read again when it changes, as a mounted Kubernetes Secret does when it is
    rotated; the next request is checked against the new keys. If the file becomes empty, unreadable
    or invalid, the previous keys stay valid.
    """

    def __init__(
        self,
        text: str | None = None,
        *,
        path: Path | None = None,
        where: str = "API keys",
        check: Callable[[Weights], None] = _accept,
    ) -> None:
        """Args:
        text: fixed keys, as of `tita.records.parse_api_keys`; None for an open server.
        path: a file of keys instead.
        where: names the source of fixed keys in messages.
        check: raises `TitaError` for weights that the server cannot apply.

        Raises:
            TitaError: the file has no keys, or something in it is invalid.
        """
        self._path = path
        self._where = where if path is None else str(path)
        self._checks = [check]
        self._version = _file_version(path) if path is not None else None
        self._keys: list[ApiKey] = []
        if path is not None:
            self._keys = self._read(path)
        elif text is not None:
            self._keys = self._parse(text)

    @property
    def required(self) -> bool:
        """Whether a client needs a key."""
        return bool(self._keys)

    def find(self, key: bytes) -> Weights | None:
        """The default weights of a key, empty without any; None if it is not accepted."""
        self._reload()
        # Compare with every key in constant time, so that timing reveals nothing about any key.
        matches = [each for each in self._keys if hmac.compare_digest(key, each.key.encode())]
        return matches[0].weights if matches else None

    def add_check(self, check: Callable[[Weights], None]) -> None:
        """Check the weights of all keys, and of those that are read later, by a further rule.

        Raises:
            TitaError: the server cannot apply the weights of a key.
        """
        self._checks.append(check)
        self.check()

    def check(self) -> None:
        """Check the weights of all keys, if what the rules depend on may have changed.

        Raises:
            TitaError: the server cannot apply the weights of a key.
        """
        self._check_all(self._keys)

    def _reload(self) -> None:
        if self._path is None or (version := _file_version(self._path)) == self._version:
            return
        # Set before reading: a change during the read is detected by the next request.
        self._version = version
        try:
            keys = self._read(self._path)
        except TitaError as error:
            logger.error("%s: %s; the previous API keys stay valid", error.where, error.what)
            return
        if keys != self._keys:
            self._keys = keys
            logger.info("%s: reloaded, %d API keys", self._path, len(keys))

    def _read(self, path: Path) -> list[ApiKey]:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeError) as error:
            what = getattr(error, "strerror", None) or "not UTF-8"
            raise TitaError(
                what.lower(), where=str(path), remedy="give a readable file of API keys"
            ) from None
        return self._parse(text)

    def _parse(self, text: str) -> list[ApiKey]:
        keys = parse_api_keys(text, where=self._where)
        self._check_all(keys)
        return keys

    def _check_all(self, keys: Sequence[ApiKey]) -> None:
        for each in keys:
            try:
                for check in self._checks if each.weights else ():
                    check(each.weights)
            except TitaError as error:
                where = f"{self._where}, line {each.line}"
                raise TitaError(error.what, where=where, remedy=error.remedy) from None


def load_api_keys(path: Path | None, *, check: Callable[[Weights], None] = _accept) -> APIKeys:
    """Load the API keys from a file, or from the variable TITA_API_KEYS.

    Args:
        path: the file.
        check: as of `APIKeys`.

    Raises:
        TitaError: a source of keys is configured and has no keys; the server must not be open then.
            Or a key has weights that the server cannot apply.
    """
    if path is not None:
        return APIKeys(path=path, check=check)
    secret = settings().api_keys
    if secret is None:
        return APIKeys()
    return APIKeys(secret.get_secret_value(), where="TITA_API_KEYS", check=check)


def _file_version(path: Path) -> tuple[int, ...] | None:
    """A value that changes with the file, also if a symbolic link to it is replaced."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
