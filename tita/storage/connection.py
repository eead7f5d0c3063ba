"""From a URI and the settings to a boto3 client that any S3 server understands."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from tita.errors import TitaError

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
"""How long a connection may be silent, not how long a transfer may take."""


def parse_uri(uri: str) -> tuple[str, str]:
    """Bucket and prefix of `s3://bucket/prefix`; a prefix that is not empty ends in `/`.

    Raises:
        TitaError: no bucket is named, or credentials are; those are not repeated.
    """
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if "@" in bucket or ":" in bucket:
        raise TitaError(
            "an s3:// URI with credentials or a port in it",
            remedy="write s3://bucket/prefix; credentials come from AWS_ACCESS_KEY_ID and its "
            "secret or a profile, the server from TITA_S3_ENDPOINT_URL",
        )
    if not bucket:
        raise TitaError(f"no bucket in {uri!r}", remedy="write s3://bucket/prefix")
    prefix = prefix.strip("/")
    return bucket, f"{prefix}/" if prefix else ""


def connect(*, workers: int) -> Any:
    """A boto3 client for the server that the settings name, for so many threads at once.

    Raises:
        TitaError: the endpoint or the AWS configuration cannot be used.
    """
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    from tita.settings import settings
    from tita.storage.bodies import sign_by_known_digests
    from tita.storage.faults import told

    here = settings()
    if here.s3_endpoint_url is not None:
        _check_endpoint(here.s3_endpoint_url)
    # What these say over several lines, with tracebacks, we say in one.
    logging.getLogger("botocore.credentials").setLevel(logging.ERROR)
    with told("the AWS configuration"), _endpoint_told():
        client = boto3.client(
            "s3",
            endpoint_url=here.s3_endpoint_url,
            region_name=here.s3_region,
            config=Config(
                **({"signature_version": UNSIGNED} if here.s3_anonymous else {}),
                max_pool_connections=workers,
                # Trying again is `faults.again`'s, which covers bodies too.
                retries={"mode": "standard", "total_max_attempts": 1},
                connect_timeout=CONNECT_TIMEOUT_S,
                read_timeout=READ_TIMEOUT_S,
                # Not every server knows trailers and newer checksums. Every one checks the
                # SHA-256 of the body that is part of the signature.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                s3={
                    "payload_signing_enabled": True,
                    # Else as ~/.aws/config says: `s3.addressing_style` may also be `virtual`.
                    **({"addressing_style": "path"} if here.s3_path_style else {}),
                },
            ),
        )
    sign_by_known_digests(client)
    client.meta.events.register_first("needs-retry.s3.HeadBucket", _end_redirects)
    return client


def _end_redirects(response: Any, **_: Any) -> None:
    """Have a redirect without a region be the end of botocore's search for the bucket's region.

    It asks for the bucket where a request is redirected, and would ask about that without end.
    """
    if response is None:
        return
    answer = response[0]
    if 300 <= answer.status_code < 400 and "x-amz-bucket-region" not in answer.headers:
        answer.status_code = 404


@contextmanager
def _endpoint_told() -> Iterator[None]:
    """A plain ValueError of botocore's is about an endpoint that it took from its own settings."""
    from botocore.exceptions import BotoCoreError

    try:
        yield
    except BotoCoreError:
        raise
    except ValueError:
        raise TitaError(
            "not the URL of a server",
            where="AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or endpoint_url in ~/.aws/config",
            remedy="write https://host",
        ) from None


def _check_endpoint(url: str) -> None:
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname)
        secret = parts.username is not None or parts.password is not None
    except ValueError:
        whole, secret = False, False
    if secret:
        raise TitaError(
            "a URL with credentials in it",
            where="TITA_S3_ENDPOINT_URL",
            remedy="give them as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    if not whole:
        raise TitaError(
            "not the URL of a server", where="TITA_S3_ENDPOINT_URL", remedy="write https://host"
        )
