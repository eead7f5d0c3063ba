"""Images in `data:` URLs (RFC 2397): what clients write, and what is wrong with the rest."""

import base64
import io
from urllib.parse import quote, quote_from_bytes

import httpx
import numpy as np
import PIL.Image
import pytest
from serve_process import Server, picture

IMAGE = picture(size=67)
TEXT = base64.b64encode(IMAGE).decode()
LINES = [TEXT[at : at + 76] for at in range(0, len(TEXT), 76)]
assert TEXT.endswith("=")
assert TEXT.count("+") > 0


def ask(server: Server, url: str) -> httpx.Response:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what"}]
    body = {"model": "tita", "max_tokens": 1, "messages": [{"role": "user", "content": parts}]}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{TEXT}",
        f"data:;base64,{TEXT}",
        f"DATA:IMAGE/PNG;BASE64,{TEXT}",
        f"data:image/png; base64 , {TEXT}\n",
        f'data:image/png;name="a.png";charset=utf-8;base64,{TEXT}',
        f"data:image/png;base64,{TEXT.rstrip('=')}",
        f"data:image/png;base64,{quote(TEXT, safe='')}",
        "data:image/png;base64," + "\r\n".join(LINES),
        "data:image/png;base64," + "%0A".join(LINES),
        # A shell makes blanks of line breaks.
        "data:image/png;base64," + " ".join(LINES),
        "data:image/png;base64," + "\n  ".join(TEXT[at : at + 75] for at in range(0, 9999, 75)),
        f"data:image/png,{quote_from_bytes(IMAGE)}",
        "data:image/x-portable-pixmap,P3 2 2 1 1 1 1 0 0 0 1 0 0 0 0 1",
    ],
)
def test_every_spelling_of_an_image_is_the_image(server: Server, url: str):
    response = ask(server, url)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("url", "code", "what"),
    [
        (f'data:image/png;name="a,b";base64,{TEXT}', "invalid_image_url", "quoted parameter"),
        ("data:;base64,", "invalid_image_url", "has no data"),
        ("data:image/png,", "invalid_image_url", "has no data"),
        (f"data:image/png;base64%2C{TEXT}", "invalid_image_url", "has no data"),
        (f"data:image/png,{TEXT}", "invalid_image_url", "write ;base64 before its comma"),
        (f"data:base64,{TEXT}", "invalid_image_url", "write ;base64 before its comma"),
        (f"data:image/png;base64,{TEXT.replace('+', ' ')}", "invalid_base64", "as %2B"),
        (f"data:image/png;base64,b'{TEXT}'", "invalid_base64", "has the character '"),
        (f"data:image/png;base64,{TEXT.replace('+', '-')}", "invalid_base64", "character -"),
        (f"data:image/png;base64,{TEXT}#", "invalid_base64", "has the character #"),
        (f"data:image/png;base64,{TEXT[:5]}", "invalid_base64", "cut off"),
        (f"data:image/png;base64,{TEXT[:80]}", "invalid_image", "truncated"),
    ],
)
def test_what_is_wrong_with_others_is_said(server: Server, url: str, code: str, what: str):
    response = ask(server, url)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == code
    assert what in error["message"]
    assert error["param"] == "messages.0.content.0.image_url"


def test_a_photograph_without_its_plus_signs_is_refused(server: Server):
    """Where a multiple of 4 is missing, the rest is base64, too, and decodes to other pixels."""
    for seed in range(100):
        noise = np.random.default_rng(seed).integers(0, 256, (96, 96, 3), np.uint8)
        content = io.BytesIO()
        PIL.Image.fromarray(noise).save(content, "JPEG")
        text = base64.b64encode(content.getvalue()).decode()
        if text.count("+") % 4 == 0:
            break
    response = ask(server, f"data:image/jpeg;base64,{text.replace('+', ' ')}")
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_base64"
