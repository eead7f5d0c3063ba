"""CORS, request ids, and the origin of the models in `/v1/models`."""

import json
import re
from pathlib import Path

import httpx
import pytest
from in_process import hosted
from serve_process import Server, about, picture

from tita.demo.models import demo_model_path
from tita.errors import TitaError
from tita.serve import ServeOptions
from tita.serve.api_keys import APIKeys
from tita.serve.model_loading import LoadedModels, load_models
from tita.serve.serve_options import LoadOptions
from tita.storage import open_store
from tita.storage.locate import Pointer, write_pointer

ORIGIN = "https://notebook.example.org"
BODY = {"model": "tita", "messages": [{"role": "user", "content": "what ?"}], "max_tokens": 3}


def test_cors_allows_the_given_origins_only(models: LoadedModels):
    options = ServeOptions(allow_origins=(ORIGIN,), keys=APIKeys("secret"), max_batch=1)
    with hosted(models, options) as client:
        preflight = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        # A browser sends a preflight request first, without the key.
        allowed = client.options("/v1/chat/completions", headers={"origin": ORIGIN, **preflight})
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == ORIGIN
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        # A browser reads an error response only if it has the CORS headers.
        rejected = client.post("/v1/chat/completions", json=BODY, headers={"origin": ORIGIN})
        assert rejected.status_code == 401
        assert rejected.headers["access-control-allow-origin"] == ORIGIN
        for name in ("x-request-id", "x-tita-ignored-fields"):
            assert name in rejected.headers["access-control-expose-headers"].lower()
        headers = {"origin": ORIGIN, "authorization": "Bearer secret"}
        answered = client.post("/v1/chat/completions", json=BODY, headers=headers)
        assert answered.status_code == 200
        assert answered.headers["access-control-allow-origin"] == ORIGIN
        for origin in ("https://evil.example.org", "null", ORIGIN + ".evil.com"):
            other = client.options("/v1/chat/completions", headers={"origin": origin, **preflight})
            assert "access-control-allow-origin" not in other.headers


def test_cors_is_off_by_default(server: Server):
    found = httpx.get(f"{server.url}/v1/models", headers={"origin": ORIGIN})
    assert not [name for name in found.headers if name.startswith("access-control")]


def test_a_request_has_one_id_in_header_body_and_log(server: Server):
    url = f"{server.url}/v1/chat/completions"
    named = httpx.post(url, json=BODY, headers={"x-request-id": "eval-7.q:12"}, timeout=60)
    assert named.headers["x-request-id"] == "eval-7.q:12"
    assert named.json()["id"] == "chatcmpl-eval-7.q:12"
    assert server.wait_for_log(r"(chatcmpl-eval-7\.q:12): ")
    unnamed = [httpx.post(url, json=BODY, timeout=60) for _ in range(2)]
    names = [answer.headers["x-request-id"] for answer in unnamed]
    assert names[0] != names[1]
    assert [answer.json()["id"] for answer in unnamed] == [f"chatcmpl-{name}" for name in names]
    # An id that could forge a log line is replaced.
    for forged in ("x" * 129, "a b", "a;b"):
        found = httpx.post(url, json=BODY, headers={"x-request-id": forged}, timeout=60)
        assert re.fullmatch(r"[0-9a-f]{32}", found.headers["x-request-id"])
    rejected = httpx.post(url, json={}, headers={"x-request-id": "mine"})
    assert (rejected.status_code, rejected.headers["x-request-id"]) == (400, "mine")


def test_a_stream_has_one_id(server: Server):
    body = BODY | {"stream": True}
    url = f"{server.url}/v1/chat/completions"
    found = httpx.post(url, json=body, headers={"x-request-id": "s1"}, timeout=60)
    events = [
        json.loads(line[6:]) for line in found.text.splitlines() if line.startswith("data: {")
    ]
    assert {event["id"] for event in events} == {"chatcmpl-s1"}
    assert found.headers["x-request-id"] == "s1"


def test_model_cards_have_the_origin_of_each_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TITA_STORE", str(tmp_path / "store"))
    store = open_store()
    digest = store.push_tree(demo_model_path("reward"), "runs/train-dpo-x1/model").digest
    pointer = Pointer(target="runs/train-dpo-x1/model", moved="2026-01-01T00:00:00Z")
    write_pointer(store, "reward/current", pointer)
    base = str(demo_model_path("base"))
    options = LoadOptions(base=base, reward="reward/current", reference="runs/train-dpo-x1/model")
    models = load_models(options)
    with hosted(models) as client:
        [card, alone] = client.get("/v1/models").json()["data"]
        answer = client.post(
            "/v1/chat/completions", json=BODY | {"messages": about(picture(), "?")}
        )
    expected = {
        "source": "runs/train-dpo-x1/model", "sha256": digest, "run": "train-dpo-x1",
        "dtype": "float32", "quantization": None, "image_aspect": "pad",
        "adapter_of": None,
    }  # fmt: skip
    assert card["reward"] == {"name": "reward/current", **expected}
    assert card["reference"] == {"name": "runs/train-dpo-x1/model", **expected}
    assert card["root"] == card["base"]["source"] == base
    assert card["base"]["run"] is None
    assert re.fullmatch(r"[0-9a-f]{64}", card["base"]["sha256"])
    assert card["parent"] == alone["id"]
    assert alone["reward"] is None
    assert answer.json()["system_fingerprint"] == card["system_fingerprint"]


@pytest.mark.parametrize("origin", ["page.test", "https://page.test/", "https://Page.test", "**"])
def test_an_origin_that_no_browser_sends_is_refused(origin: str):
    for known in ("*", "null", "http://localhost:3000", "chrome-extension://abcdef"):
        ServeOptions(allow_origins=(known,))
    with pytest.raises(TitaError, match="is not the origin of a web page; give --allow-origin as"):
        ServeOptions(allow_origins=(origin,))
