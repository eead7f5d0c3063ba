"""Incomplete response bodies: a proxy in front of a real S3 server cuts connections."""

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tita.errors import StoreUnavailable
from tita.settings import settings
from tita.storage import open_store

CUT_AFTER_BYTES = 200_000
LARGE = bytes(range(256)) * 8_000


@dataclass
class CuttingProxy:
    """Forwards bytes in both directions; cuts `cuts` connections after CUT_AFTER_BYTES."""

    upstream: tuple[str, int]
    cuts: int = 0
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))

    def serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(self.upstream)
                threading.Thread(target=self.up, args=(client, server), daemon=True).start()
                threading.Thread(target=self.down, args=(server, client), daemon=True).start()

    def up(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
        close(server)

    def down(self, server: socket.socket, client: socket.socket) -> None:
        passed = 0
        with suppress(OSError):
            while data := server.recv(65536):
                client.sendall(data)
                passed += len(data)
                if passed > CUT_AFTER_BYTES and self.take():
                    break
        close(client)
        close(server)

    def take(self) -> bool:
        with self.lock:
            if not self.cuts:
                return False
            self.cuts -= 1
            self.done += 1
            return True


def close(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


@pytest.fixture
def cutter(
    s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[CuttingProxy]:
    address = urlsplit(s3_environment["TITA_S3_ENDPOINT_URL"])
    proxy = CuttingProxy(upstream=(str(address.hostname), int(address.port or 80)))
    threading.Thread(target=proxy.serve, daemon=True).start()
    url = f"http://127.0.0.1:{proxy.listener.getsockname()[1]}"
    monkeypatch.setenv("TITA_S3_ENDPOINT_URL", url)
    settings.cache_clear()
    yield proxy
    close(proxy.listener)
    settings.cache_clear()


def test_incomplete_bodies_are_fetched_again(cutter: CuttingProxy, tmp_path: Path) -> None:
    folder = tmp_path / "tree"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.bin").write_bytes(LARGE + bytes([number]))
    store = open_store()
    store.push_tree(folder, "data")
    cutter.cuts = 3
    pulled = store.pull_tree("data", into=tmp_path / "copy")
    assert cutter.done == 3
    for number in range(4):
        assert (pulled / f"{number}.bin").read_bytes() == LARGE + bytes([number])
    cutter.cuts = 2
    assert store.get("data/0.bin") == LARGE + b"\0"
    assert cutter.done == 5


def test_attempts_are_limited_and_no_partial_file_stays(
    cutter: CuttingProxy, tmp_path: Path
) -> None:
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "0.bin").write_bytes(LARGE)
    store = open_store()
    store.push_tree(folder, "data")
    cutter.cuts = 1_000
    with pytest.raises(StoreUnavailable, match="the response body ended early"):
        store.pull_tree("data", into=tmp_path / "copy")
    assert cutter.done == 8
    assert list((tmp_path / "copy").iterdir()) == []
