"""What goes wrong between us and an S3 server, in our words, and what is worth another attempt."""

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from tita.errors import StoreUnavailable, TitaError

if TYPE_CHECKING:
    from botocore.exceptions import BotoCoreError, ClientError

T = TypeVar("T")

logger = logging.getLogger(__name__)

_ATTEMPTS = 8
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_LARGEST_SKEW_S = 900
_QUIET_ATTEMPTS = 3
"""A fault now and then is everyday; from here on someone may wonder why nothing happens."""

_MISSING = frozenset(("404", "NoSuchKey", "NotFound", "NoSuchUpload"))
_TAKEN = frozenset(("PreconditionFailed", "412"))
# Answers below 500 after which the same request may succeed.
_PASSING = frozenset(
    (
        *("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "429"),
        *("RequestTimeout", "408", "OperationAborted", "ConditionalRequestConflict"),
        *("BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody", "IDPCommunicationError"),
    )
)
_REGION = "set TITA_S3_REGION to the bucket's region, or TITA_S3_ENDPOINT_URL to its server"
_KEYS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile"
_RENEW = "renew the credentials (AWS_SESSION_TOKEN, or `aws sso login`)"
_ALLOW = "let these credentials list the bucket, and read, write and delete below this prefix"
_OTHER_SERVER = "use an S3 server that knows it (TITA_S3_ENDPOINT_URL)"
_BUCKET = "create it, or check the name and TITA_S3_ENDPOINT_URL"

# What the server says: what that means, and the remedy.
_REFUSALS: dict[str, tuple[str, str]] = {
    "NoSuchBucket": ("there is no such bucket", _BUCKET),
    "InvalidBucketName": ("not a name that a bucket can have", "write s3://bucket/prefix"),
    "InvalidAccessKeyId": ("the server does not know this access key", _KEYS),
    "SignatureDoesNotMatch": ("the secret key does not fit the access key", _KEYS),
    "AccessDenied": ("access denied", _ALLOW),
    "AllAccessDisabled": ("access denied", _ALLOW),
    "403": ("access denied", _ALLOW),
    "400": ("the server refuses the request", f"{_RENEW}, or {_REGION}"),
    "ExpiredToken": ("the credentials have expired", _RENEW),
    "ExpiredTokenException": ("the credentials have expired", _RENEW),
    "InvalidToken": ("the session token is not valid", _RENEW),
    "RequestTimeTooSkewed": ("this machine's clock is off", "set it, as by NTP"),
    "AuthorizationHeaderMalformed": ("signed for another region", _REGION),
    "IllegalLocationConstraintException": ("the bucket is in another region", _REGION),
    "NotImplemented": ("the server does not know this request", _OTHER_SERVER),
    "501": ("the server does not know this request", _OTHER_SERVER),
    "QuotaExceeded": ("the bucket is full", "free some space or raise its quota"),
    "XMinioStorageFull": ("the server's disks are full", "free some space there"),
    "507": ("the server's disks are full", "free some space there"),
}


class TornBody(StoreUnavailable):
    """A response ended early, stalled, or is not what was asked for."""


class Unsupported(TitaError):
    """The server does not know this kind of request."""


@contextmanager
def told(where: str) -> Iterator[None]:
    """Failures of boto3 in our words, without secrets.

    Raises:
        FileNotFoundError: there is no such object.
        FileExistsError: a conditional write found one there.
        StoreUnavailable: trying again later may help.
        Unsupported: the server does not know this kind of request.
        TitaError: trying again will not help.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        raise _answered(error, where=where) from None
    except BotoCoreError as error:
        raise _unanswered(error, where=where) from None
    except (ConnectionError, TimeoutError) as error:
        name = type(error).__name__
        raise StoreUnavailable(f"the store does not answer ({name})", where=where) from None
    except OSError as error:
        # What else botocore opens are files of settings. A missing one must not be taken for a
        # missing object.
        raise TitaError(
            f"a file of the AWS configuration cannot be read: {error.filename}",
            where=where,
            remedy="check AWS_WEB_IDENTITY_TOKEN_FILE, and what else names files there",
        ) from None


def _clock_is_off(error: "ClientError") -> bool:
    """Whether the server's time is further from ours than S3 lets pass."""
    there = error.response["ResponseMetadata"].get("HTTPHeaders", {}).get("date")
    try:
        return abs(parsedate_to_datetime(there).timestamp() - time.time()) > _LARGEST_SKEW_S
    except (TypeError, ValueError):
        return False


def _answered(error: "ClientError", *, where: str) -> Exception:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "403" and _clock_is_off(error):
        # An answer to HEAD has no body that could say so.
        code = "RequestTimeTooSkewed"
    if code in _PASSING or (status >= 500 and code not in _REFUSALS and status not in (501, 507)):
        return StoreUnavailable(f"the server says {code or status}", where=where)
    if error.operation_name.startswith("AssumeRole"):
        return TitaError(
            f"the role of these credentials is refused ({code})",
            where=where,
            remedy="check AWS_ROLE_ARN, its trust policy, and the web identity token",
        )
    if code in _TAKEN:
        return FileExistsError(where)
    if code in _MISSING:
        return FileNotFoundError(where)
    if 300 <= status < 400:
        return _redirected(error, where=where)
    what, remedy = _REFUSALS.get(
        code, _REFUSALS.get(str(status), (f"the server says {code or status}", None))
    )
    kind = Unsupported if status == 501 or code == "NotImplemented" else TitaError
    return kind(what, where=where, remedy=remedy)


def _redirected(error: "ClientError", *, where: str) -> TitaError:
    headers = error.response["ResponseMetadata"].get("HTTPHeaders", {})
    region, elsewhere = headers.get("x-amz-bucket-region"), urlsplit(headers.get("location", ""))
    if region:
        what, remedy = f"the bucket is in the region {region}", f"set TITA_S3_REGION to {region}"
    elif elsewhere.hostname:
        server = f"{elsewhere.scheme}://{elsewhere.netloc.rpartition('@')[2]}"
        what = f"the server sends requests on to {server}"
        remedy = f"set TITA_S3_ENDPOINT_URL to the S3 server itself, as {server}"
    else:
        what, remedy = "the bucket is in another region, or this is no S3 server", _REGION
    return TitaError(what, where=where, remedy=remedy)


def _unanswered(error: "BotoCoreError", *, where: str) -> TitaError:
    from botocore import exceptions as theirs

    name = type(error).__name__
    if isinstance(error, theirs.NoCredentialsError | theirs.NoAuthTokenError):
        remedy = (
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile or role; or "
            "TITA_S3_ANONYMOUS=true to read a public bucket"
        )
        return TitaError("no credentials", where=where, remedy=remedy)
    if isinstance(error, theirs.PartialCredentialsError):
        return TitaError("half of the credentials is missing", where=where, remedy=_KEYS)
    if isinstance(error, theirs.ProfileNotFound | theirs.ConfigParseError | theirs.ConfigNotFound):
        return TitaError(
            f"the AWS configuration cannot be used ({name})",
            where=where,
            remedy="check AWS_PROFILE and ~/.aws/config",
        )
    if isinstance(
        error,
        theirs.CredentialRetrievalError | theirs.SSOError | theirs.InvalidConfigError
        | theirs.TokenRetrievalError | theirs.RefreshWithMFAUnsupportedError,
    ):  # fmt: skip
        return TitaError(f"the credentials cannot be had ({name})", where=where, remedy=_RENEW)
    if isinstance(error, theirs.SSLError):
        return TitaError(
            "no TLS with the server: its certificate is not trusted, or it speaks none",
            where=where,
            remedy="name its authority's file in AWS_CA_BUNDLE, or check TITA_S3_ENDPOINT_URL",
        )
    if isinstance(error, theirs.InvalidRegionError):
        return TitaError("not a region", where=where, remedy=_REGION)
    if isinstance(error, theirs.ProxyConnectionError | theirs.InvalidProxiesConfigError):
        remedy = "check HTTPS_PROXY and HTTP_PROXY, or name the server in NO_PROXY"
        return StoreUnavailable("the proxy does not answer", where=where, remedy=remedy)
    if isinstance(error, theirs.ParamValidationError | theirs.UnknownEndpointError | ValueError):
        return TitaError(f"not a request for S3 ({name})", where=where, remedy=_BUCKET)
    return StoreUnavailable(
        f"the store does not answer ({name})",
        where=where,
        remedy="check the network and TITA_S3_ENDPOINT_URL if this lasts",
    )


@contextmanager
def untorn(where: str) -> Iterator[None]:
    """Reading a response's body: what breaks it off becomes a `TornBody`."""
    from botocore.exceptions import BotoCoreError

    try:
        yield
    except BotoCoreError as error:
        raise TornBody(f"the response broke off ({type(error).__name__})", where=where) from None


def again(work: Callable[[], T]) -> T:
    """The result of `work`, tried again while the store fails in ways that may pass.

    Pauses double from a tenth of a second, with jitter, so that many clients do not come back at
    once; eight attempts take about ten seconds. What lasts longer is for the job to wait out.
    """
    pause_s = _FIRST_PAUSE_S
    for attempt in range(1, _ATTEMPTS):
        try:
            return work()
        except StoreUnavailable as error:
            level = logging.DEBUG if attempt <= _QUIET_ATTEMPTS else logging.INFO
            logger.log(level, "%s; trying again (%d of %d)", error, attempt + 1, _ATTEMPTS)
        time.sleep(pause_s * random.uniform(0.5, 1.5))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    return work()
