"""What goes wrong between us and an S3 server, in our words, and what is worth another attempt."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tita.errors import StoreUnavailable, TitaError

T = TypeVar("T")

_MISSING = frozenset(("404", "NoSuchKey", "NotFound"))
_TAKEN = frozenset(("PreconditionFailed", "412", "ConditionalRequestConflict", "409"))
_PASSING = frozenset(("SlowDown", "503", "500", "InternalError", "RequestTimeout", "Throttling"))
# Between attempts at one body: botocore tries requests again, but no body that it has handed out.
_PAUSES_S = (0.2, 0.5, 1.0, 2.0)


class TornBody(StoreUnavailable):
    """A response ended early, stalled, or is not what was asked for."""


@contextmanager
def told(where: str) -> Iterator[None]:
    """Failures of boto3 in our words, without secrets.

    Raises:
        FileNotFoundError: there is no such object.
        FileExistsError: a conditional write found one there.
        StoreUnavailable: trying again later may help.
        TitaError: it will not.
    """
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except NoCredentialsError:
        raise TitaError(
            "no credentials", where=where, remedy="set AWS_ACCESS_KEY_ID and its secret"
        ) from None
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in _TAKEN:
            raise FileExistsError(where) from None
        if code in _MISSING:
            raise FileNotFoundError(where) from None
        kind = StoreUnavailable if code in _PASSING else TitaError
        raise kind(f"the server says {code}", where=where) from None
    except BotoCoreError as error:
        raise StoreUnavailable(
            f"the store does not answer ({type(error).__name__})", where=where
        ) from None


@contextmanager
def untorn(where: str) -> Iterator[None]:
    """Reading a response's body: what breaks it off becomes a `TornBody`."""
    from botocore.exceptions import BotoCoreError

    try:
        yield
    except BotoCoreError as error:
        raise TornBody(f"the response broke off ({type(error).__name__})", where=where) from None


def again(work: Callable[[], T]) -> T:
    """The result of `work`, tried again after torn bodies, a few times and with jitter."""
    for pause_s in _PAUSES_S:
        try:
            return work()
        except TornBody:
            time.sleep(pause_s * random.uniform(0.5, 1.5))
    return work()
