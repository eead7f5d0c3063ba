"""Valid and invalid bodies generated from the OpenAPI document never cause a 5xx."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode
from serve_process import Server


def fuzz(server: Server, *, num_cases: int) -> int:
    """Send this number of cases to all routes with a body; the number of cases sent."""
    description = httpx.get(f"{server.url}/openapi.json").json()
    schema = schemathesis.openapi.from_dict(description)
    operations = [each.ok() for each in schema.get_all_operations()]
    bodies = [each for each in operations if each.method.upper() == "POST" and each.body]
    assert {each.path for each in bodies} >= {"/v1/chat/completions", "/worker_generate_stream"}
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
                assert response.status_code < 500, (case.body, response.text)
                assert "Traceback" not in response.text

            send()
    return num_sent


def test_no_body_causes_a_server_error(server: Server):
    assert fuzz(server, num_cases=60) >= 60
    assert server.idle_within(5)
    assert "Traceback" not in server.log


@pytest.mark.soak
def test_2000_bodies_cause_no_server_error(server: Server):
    assert fuzz(server, num_cases=2000) >= 2000
    assert server.idle_within(5)
    assert "Traceback" not in server.log
