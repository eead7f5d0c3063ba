"""Malicious bodies: each is rejected with an OpenAI error object and without a traceback."""

import gzip
import io
import json
import struct
import zlib

import httpx
import PIL.Image
import pytest
from serve_process import Server, data_url

JSON = {"content-type": "application/json"}


def chat(content: object = "what ?", **changes: object) -> dict[str, object]:
    return {"model": "tita", "messages": [{"role": "user", "content": content}], **changes}


def with_number(name: str, number: str) -> bytes:
    """A body with this literal number, which `json.dumps` may not write."""
    return json.dumps(chat(**{name: "@"})).replace('"@"', number).encode()


def of_image(content: bytes) -> bytes:
    return json.dumps(
        chat([{"type": "image_url", "image_url": {"url": data_url(content)}}])
    ).encode()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, width: int = 8, height: int = 8) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def enormous(kind: str) -> bytes:
    """A small file whose header declares 3.6 billion pixels, or the most its format allows."""
    out = io.BytesIO()
    PIL.Image.new("L", (4, 4)).save(out, kind)
    content = bytearray(out.getvalue())
    if kind == "GIF":
        content[6:10] = struct.pack("<HH", 65535, 65535)
    elif kind == "BMP":
        content[18:26] = struct.pack("<ii", 60_000, 60_000)
    else:
        at = content.index(b"\xff\xc0")
        content[at + 5 : at + 9] = struct.pack(">HH", 65535, 65535)
    return bytes(content)


LONG_DIGITS = "9" * 6000
"""Python does not parse integers of more than 4,300 digits."""
BODIES = {
    "empty": b"",
    "truncated": json.dumps(chat()).encode()[:-3],
    "no utf-8": json.dumps(chat()).encode().replace(b"what", b"\xc3\x28"),
    "utf-16": json.dumps(chat()).encode("utf-16")[:-1],
    "null": b"null",
    "a list": b"[]",
    "a text": b'"tita"',
    "two bodies": json.dumps(chat()).encode() * 2,
    "gzip bomb": gzip.compress(bytes(10_000_000)),
    "deep list": b"[" * 200_000,
    "deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep content": json.dumps(chat("@")).replace('"@"', "[" * 50_000 + "]" * 50_000).encode(),
    "deep part": json.dumps(chat("@")).replace('"@"', '[{"type":' * 20_000).encode(),
    "content is a number": json.dumps(chat(7)).encode(),
    "content is null": json.dumps(chat(None)).encode(),
    "part is a list": json.dumps(chat([[]])).encode(),
    "words without end": json.dumps(chat("what " * 300_000)).encode(),
    "parts without end": json.dumps(chat([{"type": "text", "text": ""}] * 2000)).encode(),
    "part of a long kind": json.dumps(chat([{"type": "x" * 9999, "text": ""}])).encode(),
    "long model": json.dumps(chat(model="x" * 9999)).encode(),
    "part of no kind": json.dumps(chat([{"type": "audio", "audio": ""}])).encode(),
    "url is a number": json.dumps(chat([{"type": "image_url", "image_url": {"url": 1}}])).encode(),
    "1000 messages too many": json.dumps(chat() | {"messages": chat()["messages"] * 2025}).encode(),
    **{
        f"{name} {number[:12]}": with_number(name, number)
        for name, numbers in {
            "temperature": ("NaN", "Infinity", "-Infinity", "1e999", "-1", LONG_DIGITS, "{}"),
            "top_p": ("NaN", "-0.1", "1e400", "2", "[1]"),
            "max_tokens": ("-1", "0", "1.5", "1e400", LONG_DIGITS, '"x"', "9" * 30),
            "n": ("-1", "0", "9" * 30, LONG_DIGITS, "[]"),
            "seed": ("NaN", "9" * 30, LONG_DIGITS, "1.5"),
            "guidance_weight": ("NaN", "-Infinity", "-1", "101"),
            "top_k": ("-2", "9" * 30, "NaN"),
            "stop": ("7", '[""]' * 2, "[[]]", json.dumps(["x"] * 1000)),
            "stream": ('"perhaps"', "7"),
            "messages": ("null", "7", "{}", '[{"role": "root", "content": "x"}]'),
        }.items()
        for number in numbers
    },
    "text chunk bomb": of_image(png(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000))))),
    "profile bomb": of_image(png(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200_000_000))))),
    "enormous png": of_image(png(chunk(b"IDAT", b""), width=60_000, height=60_000)),
    "no pixels": of_image(png(chunk(b"IDAT", zlib.compress(b"")))),
    "a line": of_image(png(chunk(b"IDAT", zlib.compress(bytes(160_000))), width=1, height=40_000)),
    "no width": of_image(png(chunk(b"IDAT", zlib.compress(b"")), width=0)),
    **{f"enormous {kind}": of_image(enormous(kind)) for kind in ("GIF", "BMP", "JPEG")},
    "svg": of_image(b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
    "postscript": of_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_malicious_bodies_are_rejected(server: Server, name: str):
    response = httpx.post(
        f"{server.url}/v1/chat/completions", content=BODIES[name], headers=JSON, timeout=60
    )
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(response.content) < 4096, "the request must not be echoed at length"
    assert "Traceback" not in response.text + server.log


@pytest.mark.parametrize("place", ["model", "content", "stop", "guidance_form", "role", "url"])
def test_lone_surrogates_are_accepted_in_text_only(server: Server, place: str):
    body = chat("@" if place == "content" else "what ?", max_tokens=2)
    if place == "role":
        body["messages"] = [{"role": "@", "content": "x"}]
    elif place == "url":
        body = chat([{"type": "image_url", "image_url": {"url": "data:@,@"}}])
    elif place != "content":
        body[place] = "@"
    url = f"{server.url}/v1/chat/completions"
    for surrogate in ("\\ud800", "\\udfff what", "\\udc00\\ud800"):
        content = json.dumps(body).replace("@", surrogate).encode()
        response = httpx.post(url, content=content, headers=JSON, timeout=60)
        if place == "content":
            assert response.status_code == 200, response.text
        else:
            assert response.status_code in (400, 404), response.text
            assert response.json()["error"]["message"]
    assert "Traceback" not in server.log


def test_other_routes_and_headers(server: Server):
    for path in ("/worker_generate_stream", "/get_worker_address"):
        for name in ("truncated", "no utf-8", "deep list", "null", "gzip bomb"):
            response = httpx.post(server.url + path, content=BODIES[name], headers=JSON)
            assert 400 <= response.status_code < 500, (path, name, response.text)
    name = {"x-request-id": "a b\u00e9<script>" * 50}
    response = httpx.get(
        f"{server.url}/v1/models", headers={k: v.encode() for k, v in name.items()}
    )
    assert response.headers["x-request-id"].isalnum(), "an invalid id must not be echoed"
    assert httpx.delete(f"{server.url}/v1/models").json()["error"]["message"]
    assert "Traceback" not in server.log
