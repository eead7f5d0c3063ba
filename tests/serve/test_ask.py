"""The command `tita ask`."""

import http.server
import io
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from in_process import hosted
from serve_process import Server, picture

from tita.cli.commands import app
from tita.cli.main import run
from tita.serve import ServeOptions
from tita.serve.api_keys import APIKeys
from tita.serve.model_loading import LoadedModels
from tita.serve.serve_options import DEFAULT_ENGINE_OPTIONS
from tita.vlm.image_fetcher import ImageFetcher

QUESTION = "What number is written?"
# With this seed, the demo models give answers of several words that differ.
SAMPLED = ("describe", "--temperature", "1.5", "--seed", "7")
TALKATIVE = (*SAMPLED, "--weight", "0.9")
COST = re.compile(r"(\d+) tokens?, (\d+) changed; base \d+ ms, reward \d+ ms")


@pytest.fixture
def red(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    path.write_bytes(picture("red"))
    return path


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(app, ["ask", *arguments], name="tita")
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_it_prints_the_answer_and_its_cost(
    server: Server, red: Path, capsys: pytest.CaptureFixture[str]
):
    code, answer, cost = ask(capsys, QUESTION, "--image", str(red), "--url", f"{server.url}/v1")
    assert code == 0
    assert answer.strip()
    assert answer.count("\n") == 1
    assert COST.fullmatch(cost.strip())


def test_changed_tokens_are_highlighted_on_a_terminal(
    server: Server, red: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    strong = (*TALKATIVE, "--image", str(red), "--url", server.url)
    _, plain, cost = ask(capsys, *strong)
    assert "\x1b" not in plain
    found = COST.fullmatch(cost.strip())
    assert found is not None
    assert int(found[2]) > 0
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    _, coloured, _ = ask(capsys, *strong)
    assert "\x1b[1;32m" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    alone = (*SAMPLED, "--image", str(red), "--url", server.url, "--weight", "0")
    _, unguided, cost = ask(capsys, *alone)
    assert "\x1b[1;32m" not in unguided
    assert " 0 changed" in cost


def test_guidance_options_are_sent_to_the_server(
    server: Server, red: Path, capsys: pytest.CaptureFixture[str]
):
    asked = (QUESTION, "--image", str(red), "--url", server.url)
    fields = (*asked, "--weight", "2.5")
    base = ask(capsys, *asked, "--model", "tita:base", "--weight", "0")[1]
    assert base
    assert ask(capsys, *fields, "--plausibility", "1")[1] == base
    assert ask(capsys, *fields, "--form", "dpo")[0] == 0
    code, out, error = ask(capsys, *fields, "--form", "magic")
    assert (code, out) == (2, "")
    assert "tita, genarm, dpo" in error


def test_the_answer_is_streamed(models: LoadedModels, red: Path):
    """The first words are printed while the model is still generating."""
    gate, num_forwards = threading.Event(), itertools.count(1)

    def hold(*_: object) -> None:
        if next(num_forwards) == 5:
            gate.wait(60)

    options = ServeOptions(engine=replace(DEFAULT_ENGINE_OPTIONS, max_drafts=0))
    with hosted(models, options) as client:
        held = models.models.base.model.register_forward_pre_hook(hold)
        command = [sys.executable, "-m", "tita", "ask", *TALKATIVE, "--image", str(red)]
        try:
            with subprocess.Popen(
                [*command, "--url", str(client.base_url)], stdout=subprocess.PIPE, bufsize=0
            ) as process:
                assert process.stdout is not None
                first = process.stdout.read(4096)
                assert process.poll() is None
                gate.set()
                rest = process.stdout.read(4096)
                while more := process.stdout.read(4096):
                    rest += more
                assert process.wait(timeout=60) == 0
        finally:
            gate.set()
            held.remove()
    assert first.strip()
    assert len(rest.split()) > 1
    assert rest.endswith(b"\n")


class _OtherServer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(picture("red"))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/plain")
        self.end_headers()
        self.wfile.write(b'data: {"choices": [{"delta": {"content": "seven"}}]}\n\n')
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def image_host() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _OtherServer) as host:
        thread = threading.Thread(target=host.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{host.server_port}/red.png"
        host.shutdown()
        thread.join()


def test_an_image_may_be_a_url(
    models: LoadedModels, image_host: str, red: Path, capsys: pytest.CaptureFixture[str]
):
    fetcher = ImageFetcher(hosts=("127.0.0.1",), public=lambda _: True)
    with hosted(models, fetcher=fetcher) as client:
        url = str(client.base_url)
        by_file = ask(capsys, QUESTION, "--image", str(red), "--url", url)
        assert by_file[0] == 0
        assert ask(capsys, QUESTION, "--image", image_host, "--url", url)[:2] == by_file[:2]
    with hosted(models) as client:
        code, out, error = ask(
            capsys, QUESTION, "--image", image_host, "--url", str(client.base_url)
        )
        assert (code, out) == (2, "")
        assert "images are not fetched from this host" in error


def test_errors_are_one_line(
    server: Server, models: LoadedModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "no.png").write_bytes(b"no image")
    here = ("--url", server.url)
    wrong = [
        (2, "no answer", ("--url", "http://127.0.0.1:9")),
        (2, "no answer", ("--url", "nonsense")),
        (2, "none.png", (*here, "--image", str(tmp_path / "none.png"))),
        (2, str(tmp_path), (*here, "--image", str(tmp_path))),
        (2, "not a readable image", (*here, "--image", str(tmp_path / "no.png"))),
        (2, "no model 'gpt'", (*here, "--model", "gpt")),
        (2, "output tokens", (*here, "--max-tokens", "1000000")),
    ]
    for code, what, arguments in wrong:
        found, out, error = ask(capsys, QUESTION, *arguments)
        assert (found, out) == (code, ""), arguments
        [line] = error.splitlines()
        assert line.startswith("tita: ")
        assert what in line
    with hosted(models, ServeOptions(keys=APIKeys("right-key"))) as client:
        locked = ("--url", str(client.base_url), "--api-key")
        assert ask(capsys, QUESTION, *locked, "right-key")[0] == 0
        code, _, error = ask(capsys, QUESTION, *locked, "wrong-key")
        assert code == 2
        assert "--api-key" in error
        assert "wrong-key" not in error


class _Echoing(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        key = self.headers["authorization"].removeprefix("Bearer ")
        body = json.dumps({"error": {"message": f"Incorrect API key provided: {key}."}}).encode()
        self.send_response(401 if key != "moved" else 308)
        self.send_header("location", "https://other.test/v1/models")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


def test_a_key_that_a_server_repeats_is_masked(capsys: pytest.CaptureFixture[str]):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Echoing) as fake:
        threading.Thread(target=fake.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{fake.server_address[1]}"
        code, out, error = ask(capsys, QUESTION, "--url", url, "--api-key", "sk-secret")
        moved = ask(capsys, QUESTION, "--url", url, "--api-key", "moved")
        fake.shutdown()
    assert (code, out) == (2, "")
    wanted = "Incorrect API key provided: ***.; give --api-key or set TITA_API_KEY"
    assert error == f"tita: {url}/v1/models: {wanted}\n"
    assert moved[0] == 2
    wanted = "the server has another address, https://other.test/v1/models; change --url"
    assert moved[2] == f"tita: {url}/v1/models: {wanted}\n"


def test_a_question_in_another_encoding_is_called_so(capsys: pytest.CaptureFixture[str]):
    code, out, error = ask(capsys, b"caf\xe9 ?".decode(errors="surrogateescape"))
    assert (code, out) == (2, "")
    assert error.startswith("tita: 'caf? ?' has bytes that are not utf-8; set LANG to the")


def test_an_event_stream_may_have_another_content_type(
    image_host: str, capsys: pytest.CaptureFixture[str]
):
    url = image_host.removesuffix("/red.png")
    without_usage = (0, "seven\n", "")
    assert ask(capsys, QUESTION, "--model", "other", "--url", url) == without_usage


def test_a_server_without_openais_api_is_an_error(
    image_host: str, capsys: pytest.CaptureFixture[str]
):
    code, out, error = ask(capsys, QUESTION, "--url", image_host)
    assert (code, out) == (2, "")
    assert "does not speak OpenAI's API" in error


def test_loopback_is_asked_without_a_proxy(
    server: Server, red: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    code, answer, told = ask(capsys, QUESTION, "--image", str(red), "--url", server.url)
    assert code == 0, told
    assert answer.strip()


class _Answering(http.server.BaseHTTPRequestHandler):
    def answer(self, status: int, body: bytes, *, kind: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


@contextmanager
def answering(handler: type[_Answering]) -> Iterator[str]:
    """The URL of a server on a free port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as fake:
        threading.Thread(target=fake.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{fake.server_address[1]}"
        fake.shutdown()


class _Chinese(_Answering):
    def do_POST(self) -> None:
        chunk = json.dumps({"choices": [{"index": 0, "delta": {"content": "红字"}}]})
        self.answer(200, f"data: {chunk}\n\ndata: [DONE]\n\n".encode(), kind="text/event-stream")

    def do_GET(self) -> None:
        body = json.dumps({"data": [{"id": "m"}]}).encode()
        self.answer(200, body, kind="application/json")


def test_a_terminal_without_utf8_shows_what_it_can(tmp_path: Path):
    with answering(_Chinese) as url:
        command = [sys.executable, "-m", "tita", "ask", "what", "--url", url]
        env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == r"\u7ea2\u5b57"


def test_a_question_is_read_from_standard_input_without_a_byte_order_mark(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    asked: list[Any] = []

    class Recording(_Answering):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.answer(200, b"data: [DONE]\n\n", kind="text/event-stream")

    with answering(Recording) as url:
        for text in ("-", "\ufeffWhat is this?", "What is this?"):
            stdin = io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfWhat is this?\r\n"), encoding="utf-8")
            monkeypatch.setattr(sys, "stdin", stdin)
            assert ask(capsys, text, "--model", "m", "--url", url)[0] == 0
    questions = [each["messages"][0]["content"][-1]["text"] for each in asked]
    assert questions == ["What is this?"] * 3


@pytest.mark.parametrize("text", ["", " ", "\ufeff", "-"])
def test_an_empty_question_is_not_sent(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    wanted = "tita: the question is empty; write one, such as 'What is this?'\n"
    assert ask(capsys, text, "--url", "http://127.0.0.1:9") == (2, "", wanted)


@pytest.mark.parametrize(
    ("status", "kind", "body", "wanted"),
    [
        (200, "text/html", "<html>hi</html>", "does not speak OpenAI's API; check --url"),
        (200, "application/json", "{}", "does not speak OpenAI's API; check --url"),
        (403, "text/html", "<p>log in</p>", "<p>log in</p>; give --api-key or set TITA_API_KEY"),
        (422, "application/json", '{"detail": "no image"}', '422: {"detail": "no image"}; change'),
        (400, "text/plain", "", "HTTP 400; change the request"),
    ],
)
def test_what_another_server_says_is_shown(
    status: int, kind: str, body: str, wanted: str, capsys: pytest.CaptureFixture[str]
):
    class Other(_Answering):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.answer(status, body.encode(), kind=kind)

    with answering(Other) as url:
        code, out, error = ask(capsys, QUESTION, "--model", "m", "--url", url)
    assert (code, out) == (2, "")
    assert wanted in error
