"""Who asks from where, what a request is called, and where the models came from."""

import json
import re
from pathlib import Path

import httpx
import pytest
from in_process import hosted
from serve_process import Server, about, picture

from tita.demo.models import demo_model_path
from tita.serve import ServeOptions
from tita.serve.loading import LoadedModels, LoadOptions
from tita.serve.middleware import APIKeys
from tita.storage import open_store
from tita.storage.locate import Pointer, write_pointer

ORIGIN = "https://notebook.example.org"
BODY = {"model": "tita", "messages": [{"role": "user", "content": "what ?"}], "max_tokens": 3}


def test_pages_of_allowed_origins_may_ask(models: LoadedModels):
    options = ServeOptions(allow_origins=(ORIGIN,), keys=APIKeys(("secret",)), max_batch=1)
    with hosted(models, options) as client:
        asked = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        # A browser asks leave first, without the key.
        leave = client.options("/v1/chat/completions", headers={"origin": ORIGIN, **asked})
        assert leave.status_code == 200
        assert leave.headers["access-control-allow-origin"] == ORIGIN
        assert "authorization" in leave.headers["access-control-allow-headers"].lower()
        # It reads even a refusal only if it may, and what is to be done about it.
        refused = client.post("/v1/chat/completions", json=BODY, headers={"origin": ORIGIN})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == ORIGIN
        assert "x-request-id" in refused.headers["access-control-expose-headers"].lower()
        headers = {"origin": ORIGIN, "authorization": "Bearer secret"}
        answered = client.post("/v1/chat/completions", json=BODY, headers=headers)
        assert answered.status_code == 200
        assert answered.headers["access-control-allow-origin"] == ORIGIN
        for origin in ("https://evil.example.org", "null", ORIGIN + ".evil.com"):
            other = client.options("/v1/chat/completions", headers={"origin": origin, **asked})
            assert "access-control-allow-origin" not in other.headers


def test_no_other_page_may_ask_unless_told(server: Server):
    found = httpx.get(f"{server.url}/v1/models", headers={"origin": ORIGIN})
    assert not [name for name in found.headers if name.startswith("access-control")]


def test_a_request_has_one_name_everywhere(server: Server):
    url = f"{server.url}/v1/chat/completions"
    named = httpx.post(url, json=BODY, headers={"x-request-id": "eval-7.q:12"}, timeout=60)
    assert named.headers["x-request-id"] == "eval-7.q:12"
    assert named.json()["id"] == "chatcmpl-eval-7.q:12"
    assert server.tells(r"(chatcmpl-eval-7\.q:12): ")
    unnamed = [httpx.post(url, json=BODY, timeout=60) for _ in range(2)]
    names = [answer.headers["x-request-id"] for answer in unnamed]
    assert names[0] != names[1]
    assert [answer.json()["id"] for answer in unnamed] == [f"chatcmpl-{name}" for name in names]
    # What could forge a line of the log is no name.
    for forged in ("x" * 129, "a b", "a;b"):
        found = httpx.post(url, json=BODY, headers={"x-request-id": forged}, timeout=60)
        assert re.fullmatch(r"[0-9a-f]{32}", found.headers["x-request-id"])
    refused = httpx.post(url, json={}, headers={"x-request-id": "mine"})
    assert (refused.status_code, refused.headers["x-request-id"]) == (400, "mine")


def test_a_stream_has_one_name(server: Server):
    body = BODY | {"stream": True}
    url = f"{server.url}/v1/chat/completions"
    found = httpx.post(url, json=body, headers={"x-request-id": "s1"}, timeout=60)
    events = [
        json.loads(line[6:]) for line in found.text.splitlines() if line.startswith("data: {")
    ]
    assert {event["id"] for event in events} == {"chatcmpl-s1"}
    assert found.headers["x-request-id"] == "s1"


def test_models_say_where_they_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TITA_STORE", str(tmp_path / "store"))
    store = open_store()
    digest = store.push_tree(demo_model_path("reward"), "runs/train-dpo-x1/model").digest
    pointer = Pointer(target="runs/train-dpo-x1/model", moved="2026-01-01T00:00:00Z")
    write_pointer(store, "reward/current", pointer)
    base = str(demo_model_path("base"))
    models = LoadOptions(
        base=base, reward="reward/current", reference="runs/train-dpo-x1/model"
    ).load()
    with hosted(models) as client:
        [card, alone] = client.get("/v1/models").json()["data"]
        answer = client.post(
            "/v1/chat/completions", json=BODY | {"messages": about(picture(), "?")}
        )
    expected = {"source": "runs/train-dpo-x1/model", "sha256": digest, "run": "train-dpo-x1"}
    assert card["reward"] == {"name": "reward/current", **expected}
    assert card["reference"] == {"name": "runs/train-dpo-x1/model", **expected}
    assert card["root"] == card["base"]["source"] == base
    assert card["base"]["run"] is None
    assert re.fullmatch(r"[0-9a-f]{64}", card["base"]["sha256"])
    assert card["parent"] == alone["id"]
    assert alone["reward"] is None
    assert answer.json()["system_fingerprint"].startswith("fp_")
