"""Where the bearer keys come from."""

from pathlib import Path

from tita.errors import TitaError
from tita.settings import settings


def read_keys(path: Path | None) -> tuple[str, ...]:
    """The keys that the server accepts; none for an open server.

    Args:
        path: a file with one key a line (`#` begins a remark); TITA_API_KEYS, separated by commas,
            if not given.

    Raises:
        TitaError: keys were named and there are none, which must not open the server.
    """
    if path is not None:
        lines = path.read_text(encoding="utf-8").splitlines()
        keys = [line.strip() for line in lines if not line.lstrip().startswith("#")]
        where = str(path)
    else:
        secret = settings().api_keys
        if secret is None:
            return ()
        keys = [key.strip() for key in secret.get_secret_value().split(",")]
        where = "TITA_API_KEYS"
    found = tuple(key for key in keys if key)
    if not found:
        raise TitaError("no key in it", where=where, remedy="add one, or leave it out")
    return found
