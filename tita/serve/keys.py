"""The bearer keys: where they come from, and whether a client has one of them."""

import hmac
import logging
from collections.abc import Sequence
from pathlib import Path

from tita.errors import TitaError
from tita.settings import settings

logger = logging.getLogger(__name__)


class Keys:
    """The keys that the server accepts; none for an open server.

    Those of a file are read again when it changes, as the Secrets of Kubernetes do under a running
    pod: the next request is held to the new ones. A file that has none any more, or cannot be read,
    leaves them as they were. It neither opens the server nor shuts out its clients.
    """

    def __init__(self, known: Sequence[str] = (), *, path: Path | None = None) -> None:
        """Args:
        known: keys, for ever.
        path: a file of keys instead, one a line or with commas between; `#` begins a remark.

        Raises:
            TitaError: the file has none.
        """
        self._path = path
        self._seen = _state(path) if path is not None else None
        self._known = _encoded(known if path is None else _read(path))

    @property
    def wanted(self) -> bool:
        """Whether a client needs one."""
        return bool(self._known)

    def have(self, key: bytes) -> bool:
        """Whether that is one of them."""
        self._look_again()
        # Every key is compared, in constant time: the time tells nothing about any of them.
        matches = [hmac.compare_digest(key, known) for known in self._known]
        return any(matches)

    def _look_again(self) -> None:
        if self._path is None or (state := _state(self._path)) == self._seen:
            return
        # Before it is read: what changes meanwhile is seen by the next request.
        self._seen = state
        try:
            known = _encoded(_read(self._path))
        except TitaError as error:
            logger.error("%s: %s; the API keys stay as they were", self._path, error.what)
            return
        if known != self._known:
            self._known = known
            logger.info("%s: read again; API keys that are accepted: %d", self._path, len(known))


def read_keys(path: Path | None) -> Keys:
    """The keys that the server is to accept.

    Args:
        path: a file of keys; TITA_API_KEYS, with commas between, if not given.

    Raises:
        TitaError: keys were named and there are none, which must not open the server.
    """
    if path is not None:
        return Keys(path=path)
    secret = settings().api_keys
    return Keys(() if secret is None else _keys(secret.get_secret_value(), where="TITA_API_KEYS"))


def _state(path: Path) -> tuple[int, ...] | None:
    """What differs once the file has changed, be it by a link on the way to it."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        what = getattr(error, "strerror", None) or "no UTF-8"
        raise TitaError(what.lower(), where=str(path), remedy="name a file of keys") from None
    return _keys(text, where=str(path))


def _keys(text: str, *, where: str) -> tuple[str, ...]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found = tuple(key.strip() for line in lines for key in line.split(",") if key.strip())
    if not found:
        raise TitaError("no key in it", where=where, remedy="add one, or leave it out")
    return found


def _encoded(keys: Sequence[str]) -> tuple[bytes, ...]:
    return tuple(key.encode() for key in keys)
