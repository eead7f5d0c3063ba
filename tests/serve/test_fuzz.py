"""No request causes a 5xx or changes other answers; all responses are as `/openapi.json` says."""

import http.client
import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from jsonschema import Draft202012Validator
from mutations import VALID, Mutant, mutants
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from serve_process import Server, about, picture

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance,
    response_schema_conformance, negative_data_rejection,
]  # fmt: skip


def fuzz(server: Server, *, num_cases: int) -> int:
    """Send generated cases to all routes with a body and check each; the number of cases sent."""
    schema = schemathesis.openapi.from_dict(httpx.get(f"{server.url}/openapi.json").json())
    operations = [each.ok() for each in schema.get_all_operations()]
    bodies = [each for each in operations if each.method.upper() == "POST" and each.body]
    assert {each.path for each in bodies} == {path for path, body in VALID.items() if body}
    num_sent = 0
    for operation in bodies:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @settings(
                max_examples=num_cases // (2 * len(bodies)) + 1, deadline=None, database=None,
                derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def send(case: schemathesis.Case) -> None:
                nonlocal num_sent
                num_sent += 1
                response = case.call(base_url=server.url, timeout=60)
                case.validate_response(response, checks=CHECKS)
                assert "Traceback" not in response.text

            send()
    return num_sent


class Document:
    """The OpenAPI document of a server, to check responses with."""

    def __init__(self, server: Server) -> None:
        self._document = httpx.get(f"{server.url}/openapi.json").json()

    def check(self, sent: Mutant, status: int, content_type: str, body: bytes) -> None:
        """Check status, content type and body of a response."""
        operations = self._document["paths"].get(sent.path.partition("?")[0], {})
        operation = operations.get(sent.method.lower())
        if operation is None:
            # Unknown paths, other methods, and paths with parameters or without a description.
            return
        documented = operation["responses"].get(str(status))
        assert documented is not None, (sent, status, body[:300])
        kind = content_type.partition(";")[0]
        assert kind in documented["content"], (sent, status, content_type)
        schema = documented["content"][kind].get("schema", {})
        if kind == "application/json" and schema:
            components = {"components": self._document["components"]}
            Draft202012Validator(schema | components).validate(json.loads(body))


VICTIMS: list[dict[str, Any]] = [
    {"messages": about(picture("blue"), "describe the image"), "guidance_weight": 0.7, "seed": 5},
    {"messages": [{"role": "user", "content": "describe"}], "guidance_form": "dpo", "seed": 6},
]


def answer(server: Server, victim: dict[str, Any]) -> list[str]:
    """The tokens of a victim's streamed answer."""
    body = {"model": "tita", "temperature": 1.5, "max_tokens": 40, "ignore_eos": True}
    body |= {"stream": True, "explain": True}
    found = httpx.post(f"{server.url}/v1/chat/completions", json=body | victim, timeout=120)
    assert found.text.endswith("data: [DONE]\n\n"), found.text[-300:]
    chunks = [
        json.loads(line[6:]) for line in found.text.splitlines() if line.startswith("data: {")
    ]
    return [t["token"] for chunk in chunks for c in chunk["choices"] for t in c["explain"]]


@contextmanager
def victims(server: Server) -> Iterator[None]:
    """Two clients that ask again and again, and get the answers that they get undisturbed."""
    wanted = [answer(server, victim) for victim in VICTIMS]
    assert all(len(tokens) == 40 for tokens in wanted)
    done, num_answers = threading.Event(), [0, 0]

    def ask(number: int) -> None:
        while not done.is_set() or not num_answers[number]:
            assert answer(server, VICTIMS[number]) == wanted[number]
            num_answers[number] += 1

    with ThreadPoolExecutor(len(VICTIMS)) as pool:
        running = [pool.submit(ask, number) for number in range(len(VICTIMS))]
        try:
            yield
        finally:
            done.set()
        for each in running:
            each.result()


def send_mutants(server: Server, *, num_requests: int, seed: int) -> Counter[int]:
    """Send seeded requests, four at a time, and check each response; the number by status."""
    document, statuses = Document(server), Counter[int]()
    waiting, lock = mutants(num_requests, seed=seed), threading.Lock()

    def work() -> None:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=120)
        while True:
            with lock:
                sent = next(waiting, None)
            if sent is None:
                connection.close()
                return
            headers = {name: value.encode("utf-8") for name, value in sent.headers.items()}
            connection.request(sent.method, sent.path, sent.body, headers)
            if sent.hangs_up:
                connection.close()
                continue
            response = connection.getresponse()
            body = response.read()
            assert response.status < 500, (sent, body)
            assert b"internal error" not in body, (sent, body)
            assert b"Traceback" not in body, (sent, body)
            document.check(sent, response.status, response.headers.get("content-type", ""), body)
            with lock:
                statuses[response.status] += 1

    with ThreadPoolExecutor(4) as pool:
        for each in [pool.submit(work) for _ in range(4)]:
            each.result()
    assert "Traceback" not in server.log
    return statuses


def test_generated_bodies_get_the_documented_responses(server: Server):
    assert fuzz(server, num_cases=120) >= 120
    assert server.idle_within(60)
    assert "Traceback" not in server.log


@pytest.mark.soak
def test_2000_generated_bodies_get_the_documented_responses(server: Server):
    assert fuzz(server, num_cases=2000) >= 2000
    assert server.idle_within(60)
    assert "Traceback" not in server.log


def test_3000_requests_hurt_nobody(server: Server):
    with victims(server):
        statuses = send_mutants(server, num_requests=3000, seed=1)
    assert server.idle_within(60)
    assert statuses[200] > 500
    assert statuses[400] > 500
    assert statuses.keys() >= {200, 400, 404, 405, 415}


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_100000_requests_hurt_nobody(server: Server):
    with victims(server):
        for seed in range(20):
            statuses = send_mutants(server, num_requests=5000, seed=100 + seed)
            print(f"{5000 * (seed + 1):>7,} requests: {dict(statuses)}", flush=True)
    assert server.idle_within(60)
