"""Numbers for Prometheus: what they count, and names that dashboards for vLLM know."""

import re
from pathlib import Path

from tests.align.always import Always
from tita.align import Request, Sampling
from tita.align.preparing import Preparer
from tita.align.stepper import Stepper
from tita.serve.loading import Models
from tita.serve.metrics import Metrics
from tita.serve.readings import Readings

# docs.vllm.ai, production metrics; theirs begin with `vllm:`.
VLLM = {
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "request_success_total",
    "prompt_tokens_total", "generation_tokens_total", "prefix_cache_queries_total",
    "prefix_cache_hits_total", "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total", "time_to_first_token_seconds_bucket",
    "time_per_output_token_seconds_bucket", "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket",
}  # fmt: skip


def read(metrics: Metrics) -> dict[str, float]:
    found = re.findall(r"^tita:(\w+)\{[^}]*\} (\S+)$", metrics.text().decode(), re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_names_are_vllms():
    metrics = Metrics("tita")
    metrics.outcome("stop")
    assert read(metrics).keys() >= VLLM


def test_drafts_models_and_room_are_read_off_the_stepper(models: Models):
    base, reward, reference = models.vlms
    stepper = Stepper(base, reward, reference=reference, drafting=Always(max_drafts=3))
    metrics = Metrics("tita")
    readings = Readings(stepper, metrics=metrics, max_batch=4)
    request = Request(
        question="describe", weight=0.4, form="dpo",
        sampling=Sampling(max_new_tokens=30, ignore_end=True, temperature=1.5, seed=1),
    )  # fmt: skip
    prepared = Preparer(base, reward, reference=reference).prepare(request)
    stepper.admit("a", prepared)
    room = []
    while len(stepper):
        stepper.step()
        readings.take()
        room.append(read(metrics)["kv_cache_usage_perc"])
    readings.take()
    found = read(metrics)
    assert stepper.drafting.num_drafted > stepper.drafting.num_accepted > 0
    assert found["spec_decode_num_draft_tokens_total"] == stepper.drafting.num_drafted
    assert found["spec_decode_num_accepted_tokens_total"] == stepper.drafting.num_accepted
    assert stepper.reward is not None
    assert stepper.reference is not None
    assert abs(found["base_seconds_total"] - stepper.base.seconds) < 1e-6
    steering = stepper.reward.seconds + stepper.reference.seconds
    assert abs(found["reward_seconds_total"] - steering) < 1e-6
    assert 0 < max(room) <= 1
    assert room[-1] == 0


def test_every_metric_is_documented():
    metrics = Metrics("tita")
    metrics.outcome("stop")
    suffixes = r"_(bucket|sum|count|created)$"
    names = {re.sub(suffixes, "", name) for name in read(metrics) if "_created" not in name}
    documented = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    table = documented.partition("## Metrics")[2].partition("## Scaling")[0]
    found = set(re.findall(r"`([a-z0-9_]+)`", table))
    assert names <= found
    assert {name for name in found if "_" in name} - names <= {
        "tita_num_requests_waiting", "finished_reason",
    }  # fmt: skip
