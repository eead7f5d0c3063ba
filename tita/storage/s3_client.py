"""The boto3 client: how it is configured, how its errors are reported, what is retried."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import boto3
import tenacity
from botocore import UNSIGNED, exceptions
from botocore.auth import S3SigV4Auth
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tita.errors import ExitCode, StoreUnavailable, TitaError
from tita.settings import Settings, settings
from tita.storage.request_rate import RequestRate
from tita.storage.waits import wait

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
"""Limits the time without any data, not the duration of a transfer."""

_MAX_ATTEMPTS = 8
_THROTTLE_PATIENCE_S = 300.0
"""A request that the server throttles is repeated until no request of this process has succeeded
for so long. Other pods may use the whole rate of the bucket for a while."""
_LOG_RETRIES_EVERY_S = 60.0
_MAX_CLOCK_SKEW_S = 900
"""S3 refuses requests whose time differs by more."""

_NOT_FOUND = frozenset(("404", "NoSuchKey", "NotFound", "NoSuchUpload"))
_PRECONDITION_FAILED = frozenset(("PreconditionFailed", "412"))
# Error codes by which servers ask for fewer requests; a response to HEAD has only its status.
_THROTTLED = frozenset(
    (
        *("SlowDown", "SlowDownRead", "SlowDownWrite", "ServerBusy", "TooManyRequests", "429"),
        *("Throttling", "ThrottlingException", "ThrottledException", "RequestThrottled"),
        *("RequestLimitExceeded", "BandwidthLimitExceeded", "RequestRateTooLarge"),
    )
)
# Other error codes with a status below 500 after which the same request may succeed.
_TRANSIENT = frozenset(
    (
        *("RequestTimeout", "408", "OperationAborted", "ConditionalRequestConflict"),
        *("BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody", "IDPCommunicationError"),
    )
)
_EXPIRED = frozenset(("ExpiredToken", "ExpiredTokenException"))
_SET_REGION = "set TITA_S3_REGION to the bucket's region, or TITA_S3_ENDPOINT_URL to its server"
_CHECK_KEYS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile"
_RENEW = "renew the credentials (AWS_SESSION_TOKEN, or `aws sso login`)"
_GRANT = "grant these credentials list, read, write and delete below this prefix"
_OTHER_SERVER = "use an S3 server that supports it (TITA_S3_ENDPOINT_URL)"
_OR_ENCRYPT = "if the bucket's policy requires encryption headers, set TITA_S3_ENCRYPTION"
_GRANT_KEY = (
    "grant them kms:GenerateDataKey and kms:Decrypt for the key of TITA_S3_KMS_KEY_ID or, without "
    "it, that of the bucket's encryption"
)
_KEY_IS_OFF = (
    "the KMS key cannot be used",
    "enable it, or set another in TITA_S3_KMS_KEY_ID or for the bucket",
)
_CHECK_BUCKET = "create it, or check the name and TITA_S3_ENDPOINT_URL"

# Error code or HTTP status: message and remedy.
_PERMANENT: dict[str, tuple[str, str]] = {
    "NoSuchBucket": ("the bucket does not exist", _CHECK_BUCKET),
    "InvalidBucketName": ("invalid bucket name", "write s3://bucket/prefix"),
    "InvalidAccessKeyId": ("the server does not know this access key", _CHECK_KEYS),
    "SignatureDoesNotMatch": ("the secret key does not match the access key", _CHECK_KEYS),
    "AccessDenied": ("access denied", _GRANT),
    "AllAccessDisabled": ("access denied", _GRANT),
    "403": ("access denied", _GRANT),
    "400": ("the server rejects the request", f"{_RENEW}, or {_SET_REGION}"),
    "InvalidObjectState": (
        "the object is in an archive",
        "restore it, and exclude this prefix from the bucket's rule that archives objects",
    ),
    "KMS.DisabledException": _KEY_IS_OFF,
    "KMS.InvalidStateException": _KEY_IS_OFF,
    "KMS.NotFoundException": _KEY_IS_OFF,
    "ExpiredToken": ("the credentials have expired", _RENEW),
    "ExpiredTokenException": ("the credentials have expired", _RENEW),
    "InvalidToken": ("the session token is not valid", _RENEW),
    "RequestTimeTooSkewed": ("the clock of this machine is wrong", "set it, for example by NTP"),
    "AuthorizationHeaderMalformed": ("signed for another region", _SET_REGION),
    "IllegalLocationConstraintException": ("the bucket is in another region", _SET_REGION),
    "NotImplemented": ("the server does not support this request", _OTHER_SERVER),
    "501": ("the server does not support this request", _OTHER_SERVER),
    "QuotaExceeded": ("the bucket is full", "free some space or raise its quota"),
    "XMinioStorageFull": ("the server's disks are full", "free some space there"),
    "507": ("the server's disks are full", "free some space there"),
}

_CREATING = frozenset(("PutObject", "CreateMultipartUpload", "CopyObject"))
"""Operations that choose the encryption of an object."""

# Exceptions of botocore that are permanent: message and remedy.
_CLIENT_ERRORS: tuple[tuple[tuple[type[Exception], ...], str, str], ...] = (
    (
        (exceptions.NoCredentialsError, exceptions.NoAuthTokenError),
        "no credentials",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile or role; or "
        "TITA_S3_ANONYMOUS=true to read a public bucket",
    ),
    ((exceptions.PartialCredentialsError,), "incomplete credentials", _CHECK_KEYS),
    (
        (exceptions.ProfileNotFound, exceptions.ConfigParseError, exceptions.ConfigNotFound),
        "the AWS configuration is not valid ({name})",
        "check AWS_PROFILE and ~/.aws/config",
    ),
    (
        (
            *(exceptions.CredentialRetrievalError, exceptions.TokenRetrievalError),
            *(exceptions.SSOError, exceptions.RefreshWithMFAUnsupportedError),
            exceptions.InvalidConfigError,
        ),
        "cannot obtain credentials ({name})",
        _RENEW,
    ),
    (
        (exceptions.SSLError,),
        "TLS failed: the certificate is not trusted, or the server does not use TLS",
        "set AWS_CA_BUNDLE to the CA's file, or check TITA_S3_ENDPOINT_URL",
    ),
    ((exceptions.InvalidRegionError,), "invalid region", _SET_REGION),
    (
        (exceptions.ParamValidationError, exceptions.UnknownEndpointError, ValueError),
        "not a valid S3 request ({name})",
        _CHECK_BUCKET,
    ),
)


class Throttled(StoreUnavailable):
    """The server asks for fewer requests; the same request succeeds later."""


class ExpiredCredentials(TitaError):
    """The credentials have expired. A new pod reads those of its Secret again."""

    exit_code = ExitCode.FAILED


class NotSupported(TitaError):
    """The server does not implement this kind of request."""


def parse_uri(uri: str) -> tuple[str, str]:
    """Bucket and prefix of `s3://bucket/prefix`; a prefix that is not empty ends in `/`.

    Raises:
        TitaError: the bucket is missing, or the URI contains credentials; they are not repeated.
    """
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if "@" in bucket or ":" in bucket:
        raise TitaError(
            "an s3:// URI cannot contain credentials or a port",
            remedy="write s3://bucket/prefix; set credentials with AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY or a profile, the server with TITA_S3_ENDPOINT_URL",
        )
    if not bucket:
        raise TitaError(f"no bucket in {uri!r}", remedy="write s3://bucket/prefix")
    prefix = prefix.strip("/")
    return bucket, f"{prefix}/" if prefix else ""


def create_client(*, max_connections: int) -> Any:
    """A boto3 client for the server in the settings.

    Raises:
        TitaError: the endpoint or the AWS configuration is not valid.
    """
    here = settings()
    _check_settings(here)
    config = Config(
        **({"signature_version": UNSIGNED} if here.s3_anonymous else {}),
        max_pool_connections=max_connections,
        # `retry` also covers response bodies.
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        # Not every server supports trailers and the newer checksums. Every server checks the
        # SHA-256 of the body, which is part of the signature.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={
            "payload_signing_enabled": True,
            # Otherwise ~/.aws/config decides: `s3.addressing_style` may be `virtual`.
            **({"addressing_style": "path"} if here.s3_path_style else {}),
        },
    )
    # botocore logs errors of credentials with tracebacks; `translate_errors` reports the same
    # errors in one line.
    logging.getLogger("botocore.credentials").setLevel(logging.ERROR)
    try:
        with translate_errors("the AWS configuration"):
            if boto3.DEFAULT_SESSION is None:
                boto3.setup_default_session()
            session = boto3.DEFAULT_SESSION  # it caches credentials
            client = session.client(
                "s3", endpoint_url=here.s3_endpoint_url, region_name=here.s3_region, config=config
            )
    except ValueError:
        # botocore raises it for an endpoint in its own settings.
        raise _invalid_endpoint(
            "AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or endpoint_url in ~/.aws/config"
        ) from None
    if not here.s3_anonymous:
        _sign_by_known_digests(session, client)
    _add_parameters(here, client)
    client.meta.events.register_first("needs-retry.s3.HeadBucket", _stop_at_redirect)
    return client


def has_credentials() -> bool:
    """Whether this machine has credentials for S3.

    Raises:
        TitaError: the AWS configuration is not valid, or does not give them.
    """
    with translate_errors("the AWS configuration"):
        return boto3.Session().get_credentials() is not None


class _KnownDigestAuth(S3SigV4Auth):  # type: ignore[misc]
    """Signs a request by the SHA-256 that its body brings, if any."""

    def payload(self, request: Any) -> Any:
        return getattr(request.body, "sha256", None) or super().payload(request)


def _sign_by_known_digests(session: boto3.Session, client: Any) -> None:
    """Sign PutObject requests here, by events of botocore.

    botocore's own signer and boto3's transfer manager hash each body again, which makes the push of
    a tree, whose digests are known, 5 to 10 % slower and costs 50 % more CPU time.
    """

    def choose_signer(signature_version: Any, **_: Any) -> Any:
        return UNSIGNED if signature_version in ("s3v4", "v4") else None

    def sign(request: Any, signing_name: str, region_name: str, **known: Any) -> None:
        if known["signature_version"] is not UNSIGNED:
            return
        credentials = session.get_credentials()
        if credentials is None:
            raise exceptions.NoCredentialsError
        # After a redirect, the context has the bucket's region.
        region = request.context.get("signing", {}).get("region") or region_name
        frozen = credentials.get_frozen_credentials()
        _KnownDigestAuth(frozen, signing_name, region).add_auth(request)

    client.meta.events.register("choose-signer.s3.PutObject", choose_signer)
    client.meta.events.register("before-sign.s3.PutObject", sign)


def _stop_at_redirect(response: Any, **_: Any) -> None:
    """Turn a redirect without a region into 404.

    botocore sends HeadBucket to find the region of a bucket after a redirect. If the server
    redirects that request too, botocore would repeat it forever.
    """
    if response is None:
        return
    http = response[0]
    if 300 <= http.status_code < 400 and "x-amz-bucket-region" not in http.headers:
        http.status_code = 404


def _add_parameters(here: Settings, client: Any) -> None:
    """Add encryption and the payer to every request that takes them, by events of botocore.

    The events also cover the requests that boto3's transfer manager sends itself.
    """
    wanted = {
        "ServerSideEncryption": here.s3_encryption,
        "SSEKMSKeyId": here.s3_kms_key_id,
        "RequestPayer": "requester" if here.s3_requester_pays else None,
    }
    added = {name: value for name, value in wanted.items() if value}

    def add(params: dict[str, Any], model: Any, **_: Any) -> dict[str, Any]:
        taken = model.input_shape.members if model.input_shape else {}
        return {**{name: value for name, value in added.items() if name in taken}, **params}

    def check_encryption(http_response: Any, parsed: dict[str, Any], **_: Any) -> None:
        found = parsed.get("ServerSideEncryption")
        if http_response.status_code < 300 and found != here.s3_encryption:
            raise TitaError(
                f"the server ignores it and stores objects {'by ' + found if found else 'without'}",
                where="TITA_S3_ENCRYPTION",
                remedy="use a server that supports it, or unset it",
            )

    if added:
        client.meta.events.register("provide-client-params.s3.*", add)
    if here.s3_encryption:
        # Every push writes such an object before it sends files.
        client.meta.events.register("after-call.s3.PutObject", check_encryption)


def _check_settings(here: Settings) -> None:
    if here.s3_endpoint_url is not None:
        _check_endpoint(here.s3_endpoint_url)
    if here.s3_kms_key_id and not here.s3_encryption.startswith("aws:kms"):
        raise TitaError(
            "a KMS key needs encryption by KMS",
            where="TITA_S3_KMS_KEY_ID",
            remedy="set TITA_S3_ENCRYPTION to aws:kms or aws:kms:dsse, or unset the key",
        )
    if here.s3_requester_pays and here.s3_anonymous:
        raise TitaError(
            "an anonymous requester cannot pay",
            where="TITA_S3_REQUESTER_PAYS",
            remedy="unset it, or TITA_S3_ANONYMOUS",
        )


def _check_endpoint(url: str) -> None:
    with suppress(ValueError):
        parts = urlsplit(url)
        if parts.username is not None or parts.password is not None:
            raise TitaError(
                "the URL contains credentials",
                where="TITA_S3_ENDPOINT_URL",
                remedy="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead",
            )
        if parts.scheme in ("http", "https") and parts.hostname:
            return
    raise _invalid_endpoint("TITA_S3_ENDPOINT_URL")


def _invalid_endpoint(where: str) -> TitaError:
    return TitaError("not the URL of a server", where=where, remedy="write https://host")


_rate = RequestRate()
"""Of this process: all its requests go to one server."""


class RetryLog:
    """Logs repeated failures, one line a minute: parallel requests fail together, and again."""

    def __init__(self) -> None:
        self._logged_at = float("-inf")
        self._num_callers = 0
        self._guard = threading.Lock()

    @contextmanager
    def by_caller(self) -> Iterator[None]:
        with self._guard:
            self._num_callers += 1
        try:
            yield
        finally:
            with self._guard:
                self._num_callers -= 1

    def __call__(self, state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None
        error = state.outcome.exception()
        is_throttled = isinstance(error, Throttled)
        attempt, level = state.attempt_number + 1, logging.DEBUG
        with self._guard:
            # Single failures are normal. A caller does not see that its requests are throttled.
            is_due = time.monotonic() - self._logged_at > _LOG_RETRIES_EVERY_S
            if attempt > 4 and is_due and (is_throttled or not self._num_callers):
                self._logged_at, level = time.monotonic(), logging.INFO
        if is_throttled:
            rate = _rate.answered_per_s
            logger.log(level, "%s; slowing down, %.0f requests/s succeed", error, rate)
        else:
            logger.log(level, "%s; retrying (attempt %d of %d)", error, attempt, _MAX_ATTEMPTS)


_retry_log = RetryLog()


def caller_reports_retries() -> AbstractContextManager[None]:
    """While this is entered, the caller reports that the store is away, and `retry` does not."""
    return _retry_log.by_caller()


def _is_retried(state: tenacity.RetryCallState) -> bool:
    """Whether an attempt failed for a while; also counts how the server answers."""
    assert state.outcome is not None
    error = state.outcome.exception()
    if error is None:
        _rate.succeeded()
    elif isinstance(error, Throttled):
        _rate.refused()
    return isinstance(error, StoreUnavailable)


def _is_enough(state: tenacity.RetryCallState) -> bool:
    """Whether a request that failed is not repeated."""
    assert state.outcome is not None
    if isinstance(state.outcome.exception(), Throttled):
        last_success = max(_rate.last_success, state.start_time)
        if time.monotonic() - last_success < _THROTTLE_PATIENCE_S:
            return False
    return state.attempt_number >= _MAX_ATTEMPTS


retry = tenacity.Retrying(
    before=lambda _: wait(_rate.reserve()),
    retry=_is_retried,
    stop=_is_enough,
    # 0.1 s, doubled up to 5 s, each between 50 and 150 %: about ten seconds for eight attempts.
    wait=tenacity.wait_exponential(multiplier=0.05, max=2.5)
    + tenacity.wait_random_exponential(multiplier=0.1, max=5),
    sleep=wait,
    before_sleep=_retry_log,
    reraise=True,
)
"""`retry(work)` is the result of `work`, repeated after `StoreUnavailable`.

It gives up after eight attempts, and after `Throttled` not before no request of this process has
succeeded for five minutes.
"""


@contextmanager
def translate_errors(where: str) -> Iterator[None]:
    """Raise exceptions of boto3 as tita's, without secrets.

    Raises:
        FileNotFoundError: the object or upload does not exist.
        FileExistsError: a conditional write found an existing object.
        Throttled: the server asks for fewer requests.
        StoreUnavailable: transient; the request can be retried.
        NotSupported: the server does not implement this kind of request.
        ExpiredCredentials: for good in this process.
        TitaError: permanent.
    """
    try:
        yield
    except ClientError as error:
        raise _from_response(error, where=where) from None
    except BotoCoreError as error:
        raise _from_client(error, where=where) from None
    except (ConnectionError, TimeoutError) as error:
        name = type(error).__name__
        raise StoreUnavailable(f"the store does not answer ({name})", where=where) from None
    except OSError as error:
        # The only other files that botocore opens are its configuration. A missing one must not be
        # mistaken for a missing object.
        raise TitaError(
            f"a file of the AWS configuration cannot be read: {error.filename}",
            where=where,
            remedy="check AWS_WEB_IDENTITY_TOKEN_FILE and the other variables that name files",
        ) from None


def _clock_is_wrong(error: ClientError) -> bool:
    """Whether the server's clock and this machine's differ by more than S3 allows."""
    date = error.response["ResponseMetadata"].get("HTTPHeaders", {}).get("date")
    try:
        return abs(parsedate_to_datetime(date).timestamp() - time.time()) > _MAX_CLOCK_SKEW_S
    except (TypeError, ValueError):
        return False


def _is_busy(code: str, status: int) -> bool:
    """Whether 503 without a clear code means fewer requests: others have just succeeded."""
    is_vague = status == 503 and code in ("", "503", "ServiceUnavailable")
    return is_vague and time.monotonic() - _rate.last_success < READ_TIMEOUT_S


def _from_response(error: ClientError, *, where: str) -> Exception:
    """The exception for an error response of the server."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "403" and _clock_is_wrong(error):
        # A response to HEAD has no body, so it has no error code.
        code = "RequestTimeTooSkewed"
    if code in _THROTTLED or status == 429 or _is_busy(code, status):
        return Throttled(f"the server responds {code or status}", where=where)
    if code in _TRANSIENT or (
        status >= 500 and code not in _PERMANENT and status not in (501, 507)
    ):
        return StoreUnavailable(f"the server responds {code or status}", where=where)
    if error.operation_name.startswith("AssumeRole"):
        return TitaError(
            f"the role of these credentials is refused ({code})",
            where=where,
            remedy="check AWS_ROLE_ARN, its trust policy, and the web identity token",
        )
    if code in _PRECONDITION_FAILED:
        return FileExistsError(where)
    if code in _NOT_FOUND:
        return FileNotFoundError(where)
    if 300 <= status < 400:
        return _from_redirect(error, where=where)
    message = str(error.response.get("Error", {}).get("Message", ""))
    what, remedy = _permanent(code, str(status), message)
    kind: type[TitaError] = TitaError
    if error.operation_name in _CREATING and settings().s3_encryption and "KMS is not" in message:
        # MinIO. It responds 501, and yet supports everything else in this request.
        what, remedy = "the server has no KMS", "configure one there, or unset TITA_S3_ENCRYPTION"
    elif error.operation_name in _CREATING and not settings().s3_encryption and remedy == _GRANT:
        remedy = f"{_GRANT}; {_OR_ENCRYPT}"
    elif status == 501 or code == "NotImplemented":
        kind = NotSupported
    elif code in _EXPIRED:
        kind = ExpiredCredentials
    return kind(what, where=where, remedy=remedy)


def _permanent(code: str, status: str, message: str) -> tuple[str, str | None]:
    """What is wrong, and the remedy."""
    if code == "AccessDenied" and "kms:" in message:
        return "these credentials may not use the KMS key", _GRANT_KEY
    if "Object Lock" in message:
        what = "the bucket has Object Lock with a default retention"
        return what, "use a bucket without, or remove the default retention"
    if code in _PERMANENT:
        return _PERMANENT[code]
    if status in _PERMANENT and (status in ("501", "507") or code in ("", status)):
        return _PERMANENT[status]
    # With a code, 400 and 403 are not about credentials alone.
    return f"the server responds {': '.join(filter(None, (code or status, message[:200])))}", None


def _from_redirect(error: ClientError, *, where: str) -> TitaError:
    headers = error.response["ResponseMetadata"].get("HTTPHeaders", {})
    region, location = headers.get("x-amz-bucket-region"), urlsplit(headers.get("location", ""))
    if region:
        what, remedy = f"the bucket is in region {region}", f"set TITA_S3_REGION to {region}"
    elif location.hostname:
        server = f"{location.scheme}://{location.netloc.rpartition('@')[2]}"
        what = f"the server redirects to {server}"
        remedy = f"set TITA_S3_ENDPOINT_URL to the S3 server itself, for example {server}"
    else:
        what = "the bucket is in another region, or this is not an S3 server"
        remedy = _SET_REGION
    return TitaError(what, where=where, remedy=remedy)


def _from_client(error: BotoCoreError, *, where: str) -> TitaError:
    """The exception for an error that botocore raises itself."""
    name = type(error).__name__
    if (
        isinstance(error, exceptions.CredentialRetrievalError)
        and error.kwargs.get("provider") == "container-role"
    ):
        # Such as EKS Pod Identity, whose agent is restarted by its upgrades.
        what = "the endpoint that issues cloud credentials does not answer"
        return StoreUnavailable(what, where=where)
    for kinds, what, remedy in _CLIENT_ERRORS:
        if isinstance(error, kinds):
            return TitaError(what.format(name=name), where=where, remedy=remedy)
    if isinstance(error, exceptions.ProxyConnectionError | exceptions.InvalidProxiesConfigError):
        remedy = "check HTTPS_PROXY and HTTP_PROXY, or add the server to NO_PROXY"
        return StoreUnavailable("the proxy does not answer", where=where, remedy=remedy)
    if isinstance(error, exceptions.ResponseStreamingError | exceptions.IncompleteReadError):
        return StoreUnavailable(f"the response body ended early ({name})", where=where)
    return StoreUnavailable(
        f"the store does not answer ({name})",
        where=where,
        remedy="if this lasts, check the network and TITA_S3_ENDPOINT_URL",
    )
