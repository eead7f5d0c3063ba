"""Prometheus metrics: values, names compatible with vLLM's dashboards, and documentation."""

import re
from collections import Counter
from pathlib import Path

import pytest
from in_process import hosted

from tests.align.always import Always
from tita.align import Engine, Guidance, Request, Sampling
from tita.engine.transformers_batch import TransformersBatch
from tita.serve import ServeOptions
from tita.serve.api_keys import APIKeys
from tita.serve.metrics import EngineMetrics, Metrics
from tita.serve.model_loading import LoadedModels

# docs.vllm.ai, production metrics, without the prefix `vllm:`.
VLLM = {
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "request_success_total",
    "prompt_tokens_total", "generation_tokens_total", "prefix_cache_queries_total",
    "prefix_cache_hits_total", "spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total", "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket", "time_per_output_token_seconds_bucket",
    "request_time_per_output_token_seconds_bucket", "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket", "request_prefill_time_seconds_bucket",
    "request_decode_time_seconds_bucket", "request_inference_time_seconds_bucket",
    "request_prompt_tokens_bucket", "request_generation_tokens_bucket",
}  # fmt: skip


def read(metrics: Metrics | str) -> dict[str, float]:
    """Values by name; of samples with the same name, such as buckets, the last."""
    text = metrics if isinstance(metrics, str) else metrics.text().decode()
    found = re.findall(r"^tita:(\w+)\{[^}]*\} (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_names_are_those_of_vllm():
    assert read(Metrics("tita")).keys() >= VLLM


def test_metrics_of_one_request_are_consistent(models: LoadedModels):
    with hosted(models) as client:
        body = {"model": "tita", "messages": [{"role": "user", "content": "what"}]}
        usage = client.post(
            "/v1/chat/completions", json=body | {"max_tokens": 5, "ignore_eos": True}
        ).json()["usage"]
        found = read(client.get("/metrics").text)
    assert found["request_prompt_tokens_sum"] == usage["prompt_tokens"]
    assert found["request_generation_tokens_sum"] == usage["completion_tokens"] == 5
    once = [name for name in found if name.endswith("_count")]
    between = {"inter_token_latency_seconds_count", "time_per_output_token_seconds_count"}
    assert {name: found[name] for name in once} == {
        name: 4 if name in between else 1 for name in once
    }
    sums = {name: found[f"{name}_seconds_sum"] for name in (
        "request_queue_time", "request_prefill_time", "request_decode_time",
        "request_inference_time", "inter_token_latency", "time_to_first_token",
        "request_time_per_output_token", "e2e_request_latency",
    )}  # fmt: skip
    near = pytest.approx
    assert sums["request_prefill_time"] + sums["request_decode_time"] == near(
        sums["request_inference_time"]
    )
    assert sums["request_queue_time"] + sums["request_prefill_time"] == near(
        sums["time_to_first_token"]
    )
    assert sums["inter_token_latency"] == near(sums["request_decode_time"])
    assert sums["request_time_per_output_token"] == near(sums["request_decode_time"] / 4)
    assert (
        sums["e2e_request_latency"] >= sums["request_queue_time"] + sums["request_inference_time"]
    )


def test_counts_of_the_batch_are_copied(models: LoadedModels):
    engine = Engine(models.models)
    engine.draft_policy = Always(max_drafts=3)
    metrics = Metrics("tita")
    step_engine = TransformersBatch(engine, max_batch=4)
    batch = step_engine.batch
    engine_metrics = EngineMetrics(step_engine, metrics=metrics)
    request = Request(
        question="describe", guidance=Guidance(weight=0.4, form="dpo"),
        sampling=Sampling(max_new_tokens=30, ignore_end=True, temperature=1.5, seed=1),
    )  # fmt: skip
    batch.admit("a", engine.preparer.prepare(request))
    kv_usage = []
    while len(batch):
        batch.step()
        engine_metrics.update()
        kv_usage.append(read(metrics)["kv_cache_usage_perc"])
    engine_metrics.update()
    found = read(metrics)
    assert batch.draft_policy.num_drafted > batch.draft_policy.num_accepted > 0
    rounds = found["spec_decode_num_drafts_total"]
    assert 0 < rounds <= batch.draft_policy.num_drafted <= 3 * rounds
    assert found["spec_decode_num_draft_tokens_total"] == batch.draft_policy.num_drafted
    assert found["spec_decode_num_accepted_tokens_total"] == batch.draft_policy.num_accepted
    seconds = {role: runner.seconds for role, runner in batch.runners.items()}
    assert abs(found["base_seconds_total"] - seconds["base"]) < 1e-6
    guiding_s = seconds["reward"] + seconds["reference"]
    assert abs(found["reward_seconds_total"] - guiding_s) < 1e-6
    assert 0 < max(kv_usage) <= 1
    assert kv_usage[-1] == 0


def test_every_metric_is_documented():
    metrics = Metrics("tita")
    assert not [name for name in read(metrics) if name.endswith("_created")]
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in read(metrics)}
    documented = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    table = documented.partition("## Metrics")[2].partition("## Scaling")[0]
    found = set(re.findall(r"`([a-z0-9_]+)`", table))
    assert names <= found
    assert {name for name in found if "_" in name} - names <= {
        "tita_num_requests_waiting", "finished_reason",
    }  # fmt: skip


def test_refusals_are_counted_by_status(models: LoadedModels):
    options = ServeOptions(keys=APIKeys("secret"))
    with hosted(models, options) as client:
        body = {"model": "tita", "messages": [{"role": "user", "content": "what"}]}
        path, key = "/v1/chat/completions", {"authorization": "Bearer secret"}
        sent = [
            client.post(path, json=body),
            client.post(path, json=body | {"max_tokens": 1}, headers=key),
            client.post(path, json=body | {"n": 0}, headers=key),
            client.post(path, json=body | {"tools": [1]}, headers=key),
            client.post(path, json=body | {"model": "gpt"}, headers=key),
            client.post("/worker_generate_stream", json={}, headers=key),
            client.post("/nowhere", json={}, headers=key),
            client.get(path, headers=key),
            client.post(path, content=b"{}", headers=key),
        ]
        text = client.get("/metrics").text
    expected = Counter(str(each.status_code) for each in sent if each.status_code >= 400)
    assert expected == {"400": 3, "401": 1, "404": 2, "405": 1, "415": 1}
    found = re.findall(r'^tita:refused_requests_total\{code="(\d+)",[^}]*\} (\S+)$', text, re.M)
    assert {code: float(count) for code, count in found if float(count)} == expected
    assert {"429", "500", "503", "504"} <= dict(found).keys(), "counters exist from the start"
