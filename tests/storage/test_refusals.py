"""Errors of credentials, bucket and clock: one line with a remedy, and the exit code."""

import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tenacity import wait_none

from tests.s3_server import client
from tita.cli.main import tita
from tita.errors import ExitCode, StoreUnavailable, TitaError
from tita.settings import settings
from tita.storage import open_store
from tita.storage.request_rate import RequestRate

NO_PROFILE = {"AWS_CONFIG_FILE": "/nowhere", "AWS_SHARED_CREDENTIALS_FILE": "/nowhere"}


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tita.storage.s3_client.retry.wait", wait_none())
    monkeypatch.setattr("tita.storage.s3_client._rate", RequestRate())
    # boto3 caches credentials.
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in NO_PROFILE.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "uri", "message", "remedy"),
    [
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, None, "no credentials", "set"),
        ({"AWS_SECRET_ACCESS_KEY": None}, None, "incomplete credentials", "check AWS_ACCESS_KEY"),
        (
            {"AWS_SECRET_ACCESS_KEY": "wrong"},
            None,
            "secret key does not match",
            "AWS_SECRET_ACCESS",
        ),
        (
            {"AWS_ACCESS_KEY_ID": "stranger"},
            None,
            "does not know this access key",
            "AWS_ACCESS_KEY",
        ),
        ({"AWS_PROFILE": "nobody"}, None, "configuration is not valid", "AWS_PROFILE"),
        ({}, "s3://no-such-bucket-here/x", "the bucket does not exist", "create it"),
        ({"TITA_S3_ENDPOINT_URL": "localhost:1"}, None, "not the URL of a server", "https://"),
        (
            {"TITA_S3_ENDPOINT_URL": None, "AWS_ENDPOINT_URL_S3": "localhost:1"},
            None,
            "AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or endpoint_url",
            "https://",
        ),
        ({"TITA_S3_REGION": "invalid region"}, None, "invalid region", "TITA_S3_REGION"),
    ],
)
def test_errors_of_a_real_server_have_a_remedy(
    s3_environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str | None],
    uri: str | None,
    message: str,
    remedy: str,
) -> None:
    for name, value in environment.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(TitaError) as caught:
        open_store(uri).get("x")
    line = str(caught.value)
    assert message in line
    assert remedy in line
    assert "\n" not in line
    assert caught.value.exit_code == ExitCode.USER


def test_command_line_prints_one_line_and_exits_with_the_code(
    s3_environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2-is-wrong")
    with pytest.raises(SystemExit) as caught:
        tita(["data", "ls"])
    assert caught.value.code == ExitCode.USER
    said = capsys.readouterr()
    assert said.out == ""
    assert "the secret key does not match the access key; check AWS_" in said.err
    assert said.err.count("\n") == 1
    assert "hunter2" not in said.err


class Refusing(BaseHTTPRequestHandler):
    """Responds with errors from the S3 API reference that no test server can be made to send."""

    protocol_version = "HTTP/1.1"
    status: ClassVar[int] = 403
    code: ClassVar[str] = ""
    message: ClassVar[str] = "no"
    headers_to_send: ClassVar[dict[str, str]] = {}
    seen: ClassVar[list[dict[str, str]]] = []

    def refuse(self) -> None:
        self.seen.append({**dict(self.headers.items()), "path": self.path})
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = f"<Error><Code>{self.code}</Code><Message>{self.message}</Message></Error>"
        if self.path == "/":  # a request to STS
            body = f"<ErrorResponse>{body}</ErrorResponse>"
        if self.status == 200:
            body = "<html><body>Welcome to the console</body></html>"
        self.send_response_only(self.status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in self.headers_to_send.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body.encode())

    do_GET = do_PUT = do_HEAD = do_POST = refuse  # noqa: N815

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str], None]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(Refusing, "seen", [])
    monkeypatch.setattr(Refusing, "headers_to_send", {"x-amz-bucket-region": "eu-central-1"})
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "TITA_S3_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}",
        "TITA_S3_REGION": "eu-central-1",
        "TITA_STORE": "s3://bucket/prefix",
    }.items():
        monkeypatch.setenv(name, value)

    def answer(status: int, code: str) -> None:
        monkeypatch.setattr(Refusing, "status", status)
        monkeypatch.setattr(Refusing, "code", code)

    yield answer
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "message", "remedy"),
    [
        (
            403,
            "AccessDenied",
            "access denied",
            "grant these credentials list, read, write and delete",
        ),
        (400, "InvalidToken", "session token is not valid", "AWS_SESSION_TOKEN"),
        (403, "RequestTimeTooSkewed", "clock of this machine is wrong", "NTP"),
        (400, "AuthorizationHeaderMalformed", "another region", "TITA_S3_REGION"),
        (301, "PermanentRedirect", "in region eu-central-1", "TITA_S3_REGION to eu-central-1"),
        (507, "XMinioStorageFull", "disks are full", "free some space"),
        (418, "Teapot", "the server responds Teapot", ""),
    ],
)
def test_documented_errors_are_not_retried(
    refusing: Callable[[int, str], None], status: int, code: str, message: str, remedy: str
) -> None:
    refusing(status, code)
    with pytest.raises(TitaError) as caught:
        open_store().get("x")
    assert message in str(caught.value)
    assert remedy in str(caught.value)
    assert caught.value.exit_code == ExitCode.USER
    # boto3 itself requests the bucket's region after a redirect.
    assert len(Refusing.seen) <= (3 if status == 301 else 1), "it was retried"


@pytest.mark.parametrize(
    ("status", "code", "words", "expected"),
    [
        (
            400,
            "InvalidRequest",
            "Content-MD5 OR x-amz-checksum- HTTP header is required for Put Object requests with "
            "Object Lock parameters",
            "the bucket has Object Lock with a default retention; use a bucket without",
        ),
        (
            403,
            "AccessDenied",
            "User: arn is not authorized to perform: kms:GenerateDataKey on resource: arn",
            "may not use the KMS key; grant them kms:GenerateDataKey and kms:Decrypt",
        ),
        (
            403,
            "AccessDenied",
            "User: arn is not authorized to perform: s3:PutObject with an explicit deny",
            "this prefix; if the bucket's policy requires encryption headers, set TITA_S3_ENCRYPT",
        ),
        (400, "KMS.DisabledException", "the key is disabled", "enable it, or set another"),
        (403, "InvalidObjectState", "storage class", "the object is in an archive; restore it"),
        (
            400,
            "InvalidArgument",
            "This is odd.",
            "the server responds InvalidArgument: This is odd.",
        ),
    ],
)
def test_an_error_with_a_code_is_not_taken_for_one_of_credentials(
    refusing: Callable[[int, str], None],
    status: int,
    code: str,
    words: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Refusing, "message", words)
    refusing(status, code)
    with pytest.raises(TitaError) as caught:
        open_store().put("x", b"1")
    assert expected in str(caught.value)
    assert "TITA_S3_REGION" not in str(caught.value)
    assert len(Refusing.seen) == 1, "it was retried"


def test_a_server_without_a_kms_is_not_taken_for_one_without_conditions(
    refusing: Callable[[int, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TITA_S3_ENCRYPTION", "aws:kms")
    settings.cache_clear()
    # The response of MinIO.
    monkeypatch.setattr(
        Refusing, "message", "Server side encryption specified but KMS is not configured"
    )
    refusing(501, "NotImplemented")
    with pytest.raises(TitaError, match=r"the server has no KMS; .* unset TITA_S3_ENCRYPTION"):
        open_store().put("x", b"1", if_absent=True)


def test_encryption_is_suggested_only_where_it_may_be_missing(
    refusing: Callable[[int, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing(403, "AccessDenied")
    with pytest.raises(TitaError, match="access denied") as reading:
        open_store().get("x")
    monkeypatch.setenv("TITA_S3_ENCRYPTION", "aws:kms")
    settings.cache_clear()
    with pytest.raises(TitaError, match="access denied") as writing:
        open_store().put("x", b"1")
    assert "TITA_S3_ENCRYPTION" not in f"{reading.value} {writing.value}"


def test_expired_credentials_are_no_mistake(refusing: Callable[[int, str], None]) -> None:
    """A pod that Kubernetes starts again reads its Secret again; the start counts as a try."""
    refusing(400, "ExpiredToken")
    with pytest.raises(TitaError, match=r"credentials have expired; .*AWS_SESSION_TOKEN") as caught:
        open_store().get("x")
    assert caught.value.exit_code == ExitCode.FAILED
    assert len(Refusing.seen) == 1, "it was retried"


def test_an_agent_that_issues_credentials_may_be_away(
    refusing: Callable[[int, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as that of EKS Pod Identity while it is upgraded."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    url = f"{os.environ['TITA_S3_ENDPOINT_URL']}/v1/credentials"
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", url)
    monkeypatch.setattr("botocore.utils.ContainerMetadataFetcher.SLEEP_TIME", 0)
    refusing(500, "InternalError")
    with pytest.raises(StoreUnavailable, match="issues cloud credentials does not answer"):
        open_store().get("x")


def test_wrong_clock_is_detected_without_a_response_body(
    refusing: Callable[[int, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing(403, "RequestTimeTooSkewed")
    with pytest.raises(TitaError, match="access denied"):
        open_store().exists("x")
    there = format_datetime(datetime.now(UTC) - timedelta(hours=1), usegmt=True)
    monkeypatch.setattr(Refusing, "headers_to_send", {"Date": there})
    with pytest.raises(TitaError, match="clock of this machine is wrong"):
        open_store().exists("x")


@pytest.fixture
def web_identity(
    refusing: Callable[[int, str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Path:
    """A web identity token file, with the store's server as STS."""
    token = tmp_path / "token"
    token.write_text("a-token")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/tita",
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(token),
        "AWS_ENDPOINT_URL_STS": os.environ["TITA_S3_ENDPOINT_URL"],
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    return token


def test_missing_web_identity_token_is_not_a_missing_object(
    web_identity: Path, caplog: pytest.LogCaptureFixture
) -> None:
    web_identity.unlink()
    for ask in (lambda: open_store().exists("x"), lambda: list(open_store().list())):
        with pytest.raises(TitaError, match=r"token; check AWS_WEB_IDENTITY_TOKEN_FILE") as caught:
            ask()
        assert caught.value.exit_code == ExitCode.USER
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        (503, "ServiceUnavailable", ExitCode.RETRY),
        (400, "IDPCommunicationError", ExitCode.RETRY),
        (400, "InvalidIdentityToken", ExitCode.USER),
    ],
)
def test_refused_role_is_permanent_and_unavailable_one_is_not(
    web_identity: Path,
    refusing: Callable[[int, str], None],
    status: int,
    code: str,
    exit_code: ExitCode,
) -> None:
    refusing(status, code)
    with pytest.raises(TitaError, match=code) as caught:
        open_store().get("x")
    assert caught.value.exit_code == exit_code


def test_public_bucket_is_read_without_credentials(
    refusing: Callable[[int, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    refusing(404, "NoSuchKey")
    with pytest.raises(TitaError, match=r"no credentials.*TITA_S3_ANONYMOUS=true"):
        open_store().exists("x")
    with pytest.raises(TitaError, match="no credentials"):
        open_store().put("x", b"")
    monkeypatch.setenv("TITA_S3_ANONYMOUS", "true")
    settings.cache_clear()
    assert not open_store().exists("x")
    (request,) = Refusing.seen
    assert "authorization" not in {name.lower() for name in request}


def test_web_page_is_not_an_empty_store(
    refusing: Callable[[int, str], None],
) -> None:
    refusing(200, "")
    with pytest.raises(
        TitaError, match="this is not an S3 server; check the port in TITA_S3_ENDPOINT_URL"
    ):
        list(open_store().list())


@pytest.mark.parametrize("ask", ["get", "exists"])
@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "in another region, or this is not an S3 server; set TITA_S3_REGION"),
        (
            {"Location": "https://s3.example:9000/bucket/x?secret"},
            "redirects to https://s3.example:9000; set TITA_S3_ENDPOINT_URL",
        ),
    ],
)
def test_redirect_without_a_region_is_not_followed_forever(
    refusing: Callable[[int, str], None],
    monkeypatch: pytest.MonkeyPatch,
    headers: dict[str, str],
    message: str,
    ask: str,
) -> None:
    monkeypatch.delenv("TITA_S3_REGION")
    monkeypatch.setattr(Refusing, "headers_to_send", headers)
    refusing(301, "PermanentRedirect")
    with pytest.raises(TitaError, match=message) as caught:
        getattr(open_store(), ask)("x")
    assert caught.value.exit_code == ExitCode.USER
    assert "secret" not in str(caught.value)
    # The second is boto3's own request for the bucket's region.
    assert len(Refusing.seen) == 2


def test_transient_errors_are_retried_and_exit_with_75(
    refusing: Callable[[int, str], None],
) -> None:
    refusing(500, "InternalError")
    with pytest.raises(StoreUnavailable, match="the server responds InternalError") as caught:
        open_store().put("x", b"")
    assert caught.value.exit_code == ExitCode.RETRY
    assert len(Refusing.seen) == 8


@pytest.mark.parametrize("operation", ["read", "write"])
def test_requests_carry_session_token_region_and_digest(
    refusing: Callable[[int, str], None], monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "the-token")
    refusing(418, "Teapot")
    with pytest.raises(TitaError):
        open_store().put("x", b"data") if operation == "write" else open_store().get("x")
    (request,) = Refusing.seen
    headers = {name.lower(): value for name, value in request.items()}
    assert headers["x-amz-security-token"] == "the-token"
    assert "/eu-central-1/s3/aws4_request" in headers["authorization"]
    body = b"data" if operation == "write" else b""
    assert headers["x-amz-content-sha256"] == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize("style", ["path", "virtual"])
def test_buckets_are_addressed_by_path_or_by_host(
    moto_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, style: str
) -> None:
    port = moto_environment["TITA_S3_ENDPOINT_URL"].rpartition(":")[2]
    monkeypatch.setenv("TITA_S3_ENDPOINT_URL", f"http://localhost:{port}")
    monkeypatch.setenv("TITA_S3_PATH_STYLE", str(style == "path"))
    config = tmp_path / "config"
    config.write_text("[default]\ns3 =\n    addressing_style = virtual\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    look_up, asked = socket.getaddrinfo, set[str]()

    def local(host: str, *rest: Any, **more: Any) -> Any:
        # Names below localhost are loopback (RFC 6761), which not every resolver implements.
        asked.add(host)
        return look_up("127.0.0.1" if host.endswith("localhost") else host, *rest, **more)

    monkeypatch.setattr("socket.getaddrinfo", local)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("content")
    store = open_store()
    store.push_tree(tmp_path / "tree", "data")
    assert (store.pull_tree("data", into=tmp_path / "copy") / "file").read_text() == "content"
    assert asked == {"localhost" if style == "path" else "tests.localhost"}


def test_lifecycle_rules_and_permissions_of_the_docs_are_accepted(moto_url: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / "storage.md").read_text()
    blocks = [json.loads(b) for b in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]
    (rules,) = [b for b in blocks if "Rules" in b]
    (policy,) = [b for b in blocks if "Statement" in b]
    server = client(moto_url)
    server.create_bucket(Bucket="rules")
    server.put_bucket_lifecycle_configuration(Bucket="rules", LifecycleConfiguration=rules)
    (rule,) = server.get_bucket_lifecycle_configuration(Bucket="rules")["Rules"]
    assert rule == rules["Rules"][0]
    assert "Days" not in rule["Expiration"], "current versions never expire"
    server.put_bucket_policy(Bucket="rules", Policy=json.dumps(policy))
