"""The HTTP server of the fake API: requests, streams, and broken connections."""

import itertools
import json
import socket
import ssl
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from fake_api.actors import Actors
from fake_api.objects import Object, Refusal
from fake_api.requests import Requests, parse


class FakeApi(Requests, Actors):
    """The server, its objects, and the faults that tests inject."""

    def __init__(self, *, tls: ssl.SSLContext | None = None) -> None:
        super().__init__()
        self.requests: list[str] = []
        self.token: str | None = None
        """The bearer token that requests must have; None: no authentication."""
        self.lost_answers = 0
        """Number of POSTs that are executed but whose connection is cut before the response."""
        self._port = 0
        self._tls = tls
        self._server: _Server | None = None
        self._thawed = threading.Event()
        self._thawed.set()

    def start(self) -> "FakeApi":
        handler = type("Handler", (_Handler,), {"api": self})
        self._server = _Server(("127.0.0.1", self._port), handler)
        self._port = self._server.server_address[1]
        if self._tls is not None:  # the TLS handshake runs in the handler's thread
            self._server.socket = self._tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.alive = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop listening and break open connections."""
        assert self._server is not None
        server, self._server = self._server, None
        self.alive = False
        server.shutdown()
        server.server_close()
        server.cut()
        self.thaw()
        with self.changed:
            self.changed.notify_all()

    def freeze(self) -> None:
        """Accept connections without answering, like a stopped process."""
        self._thawed.clear()

    def thaw(self) -> None:
        """Answer again, waiting requests too."""
        self._thawed.set()

    def wait_while_frozen(self) -> None:
        self._thawed.wait()

    @property
    def url(self) -> str:
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self._port}"

    def cut(self) -> None:
        """Break all open connections."""
        assert self._server is not None
        self._server.cut()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def cut(self) -> None:
        for connection in list(self.open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                self.open.discard(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are expected."""


class _Handler(BaseHTTPRequestHandler):
    api: FakeApi
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        url = urlsplit(self.path)
        params = dict(parse_qsl(url.query))
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        self.api.requests.append(f"{self.command} {self.path}")
        self.api.wait_while_frozen()
        if not self.api.alive:
            self.close_connection = True
            return
        try:
            if self.api.token not in (None, self._token()):
                raise Refusal(401, "Unauthorized", "Unauthorized")
            if params.get("watch"):
                self._stream_watch(url.path, params)
            elif url.path.endswith("/log"):
                self._stream_log(url.path, params)
            else:
                answer = self.api.answer(self.command, url.path, params, body)
                if self.command == "POST" and self.api.lost_answers and "dryRun" not in params:
                    self.api.lost_answers -= 1
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self._send(201 if self.command == "POST" else 200, answer)
        except Refusal as refusal:
            self._refuse(refusal)

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PATCH(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def _stream_watch(self, path: str, params: dict[str, str]) -> None:
        resource, _, namespace = parse(path)
        self.api.permit("watch", resource)
        if self.api.watch_refusals:
            raise self.api.watch_refusals.pop(0)
        if self.api.watch_pages:
            self._stream([self.api.watch_pages.pop(0)])
            return
        changes = self.api.watch(resource, params, namespace)
        self._stream(change and json.dumps(change) for change in changes)

    def _stream_log(self, path: str, params: dict[str, str]) -> None:
        self.api.permit("get", "pods/log")
        if self.api.log_refusals:
            raise self.api.log_refusals.pop(0)
        lines = self.api.log(path.split("/")[-2], params)
        first = next(lines, None)  # refusals come before the headers
        self._stream(itertools.chain([first], lines))

    def _stream(self, lines: Iterable[str | None]) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        for line in lines:
            self.api.wait_while_frozen()
            if line is not None:
                self._chunk(line)
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, line: str) -> None:
        data = line.encode() + b"\n"
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _send(self, code: int, answer: Object) -> None:
        data = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, refusal: Refusal) -> None:
        data = json.dumps(
            {"kind": "Status", "status": "Failure", "code": refusal.code}
            | {"reason": refusal.reason, "message": refusal.message}
        ).encode()
        self.send_response(refusal.code)
        if refusal.retry_after is not None:
            self.send_header("Retry-After", str(refusal.retry_after))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        """Log nothing."""
