"""Photographs of twelve megapixels: what waits for the models does not hold their pixels."""

import io
import re
import threading
from pathlib import Path

import httpx
import PIL.Image
from serve_process import Server, about, serving

NUM_WAITING = 12
PIXELS_MIB = 4000 * 3000 * 3 / 2**20


def photograph(shade: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (4000, 3000), (shade, 90, 90)).save(file, "JPEG")
    return file.getvalue()


def peak_mib(server: Server) -> float:
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) / 1024


def test_waiting_requests_do_not_hold_decoded_images():
    with serving("--max-batch", "1") as server:
        server.ready()
        url = f"{server.url}/v1/chat/completions"

        def ask(shade: int, **changes: object) -> int:
            messages = about(photograph(shade), "what ?")
            body = {"model": "tita", "messages": messages, "max_tokens": 20, "ignore_eos": True}
            return httpx.post(url, json=body | changes, timeout=120).status_code

        assert [ask(shade) for shade in range(3)] == [200] * 3
        before = peak_mib(server)
        codes: list[int] = []
        threads = [
            threading.Thread(target=lambda shade=shade: codes.append(ask(shade)))
            for shade in range(3, 3 + NUM_WAITING)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert codes == [200] * NUM_WAITING
        # Two are decoded at a time, each with a copy that is padded to a square.
        assert peak_mib(server) - before < NUM_WAITING / 2 * PIXELS_MIB
