"""The program of `helm test`: checks the store and the inference Service."""

import base64
import io
import json
import os
import sys
import urllib.error
import urllib.request

from PIL import Image

from tita.errors import TitaError
from tita.records import parse_api_keys
from tita.storage import open_store


def check_store() -> None:
    """Write, read and delete one object."""
    store = open_store()
    key = f"helm-test/{os.environ['HOSTNAME']}"
    store.put(key, b"tita")
    if store.get(key) != b"tita":
        sys.exit(f"{store.uri}/{key}: the object read differs from the object written")
    store.delete(key)
    print(f"store: wrote, read and deleted {store.uri}/{key}")


def check_inference(url: str) -> None:
    """Send one request with an image and print the answer."""
    png = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(png, "PNG")
    image = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": "What colour is it?"},
    ]
    body = {
        "model": os.environ["MODEL"],
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 8,
    }
    headers = {"Content-Type": "application/json"}
    if keys := os.environ.get("TITA_API_KEYS"):
        key = parse_api_keys(keys, where="TITA_API_KEYS")[0].key
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            answer = json.load(response)
    except urllib.error.URLError as error:
        sys.exit(f"inference: {url}: {error}")
    print(f"inference: {answer['choices'][0]['message']['content']!r}")


try:
    check_store()
except TitaError as error:
    sys.exit(f"store: {error}")
if base_url := os.environ.get("BASE_URL"):
    try:
        check_inference(f"{base_url}/chat/completions")
    except TitaError as error:
        sys.exit(f"inference: {error}")
