"""vLLM's answers equal those of the transformers engine, token for token: ways to run the models.

Each test has an engine of its own.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="engine vllm is not installed: run make test-vllm")

from tests.vllm.engines import (
    GUIDANCES,
    Case,
    answers,
    assert_same,
    demo_case,
    mixed_requests,
    pictures,
    reference_engine,
    vllm_batch,
)
from tests.vllm.pairs import llava, random_pair, wider_pair
from tita.align import Guidance, Request, Sampling
from tita.align.prompts import PromptTooLong
from tita.demo.models import demo_model_path
from tita.engine.engine_options import VllmOptions
from tita.engine.vllm_engine import load_outlines, set_up, start_vllm
from tita.errors import ExitCode, TitaError
from tita.gang import free_port
from tita.vllm_plugin import guided_models
from tita.vllm_plugin.families import guided_name


@pytest.fixture(scope="module")
def random_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Random models, requests, and the transformers engine's answers."""
    paths = random_pair(tmp_path_factory.mktemp("random"))
    requests = mixed_requests(3)
    return paths, requests, reference_engine(paths).generate(requests)


def test_demo_pair_with_every_form() -> None:
    """Weights, forms and bounds mixed in one batch."""
    guidances = (*GUIDANCES, Guidance(weight=0.7, form="dpo"), Guidance(weight=0.0, form="dpo"))
    paths, requests, expected = demo_case(10, guidances)
    with vllm_batch(paths) as batch:
        assert_same(expected, answers(batch, requests))


def test_chunked_prefill(random_case: Case) -> None:
    """A chunk is shorter than an image, so images are taken in in parts."""
    paths, requests, expected = random_case
    with vllm_batch(paths, prefill_tokens=24, prefix_cache=False) as batch:
        assert_same(expected, answers(batch, requests))


def test_preemption(random_case: Case) -> None:
    """The KV cache holds few answers, so running ones are evicted and computed again."""
    paths, requests, expected = random_case
    with vllm_batch(paths, kv_cache_bytes=3 * 2**20, block_size=32, prefix_cache=False) as batch:
        assert_same(expected, answers(batch, requests))
        assert batch.counts().num_preemptions > 0


def test_an_answer_ends_where_the_context_does(random_case: Case) -> None:
    """`max_model_len` is less than the models' context and than the answer that is asked for."""
    paths, (request, *_), _ = random_case
    sampling = Sampling(max_new_tokens=1000, ignore_end=True)
    asked = dataclasses.replace(request, sampling=sampling)
    length = set_up(load_outlines(paths), VllmOptions()).preparer.prepare(asked).num_prompt_tokens
    with vllm_batch(paths, max_model_len=length + 9) as batch:
        (answer,) = answers(batch, [asked])
        assert (len(answer.token_ids), answer.finish_reason) == (9, "length")
        longer = dataclasses.replace(asked, question=10 * asked.question)
        with pytest.raises(PromptTooLong, match=f"tokens, more than {length + 8}; shorten it"):
            answers(batch, [longer])


@pytest.fixture(scope="module")
def small_case(random_case: Case) -> Case:
    """A third of the requests: on a busy machine, processes wait long for each other."""
    paths, requests, expected = random_case
    return paths, requests[::3], expected[::3]


@pytest.mark.parametrize(("tensor_parallel", "pipeline_parallel"), [(2, 1), (1, 2)])
def test_two_processes(small_case: Case, tensor_parallel: int, pipeline_parallel: int) -> None:
    """Layers split over two processes, and distributed over two."""
    paths, requests, expected = small_case
    with vllm_batch(
        paths,
        max_batch=len(requests),
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        processes=True,
        # vLLM's pipeline parallelism on CPUs needs a compiled model.
        compile=pipeline_parallel > 1,
    ) as batch:
        assert_same(expected, answers(batch, requests))
        assert batch.alive


def test_two_nodes(small_case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two commands, as on two machines; when the first one ends, so does the second."""
    paths, requests, expected = small_case
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    port = free_port()
    nodes = {"--nnodes": 2, "--node-rank": 1, "--master-addr": "127.0.0.1", "--master-port": port}
    given = nodes | {"--tensor-parallel-size": 2, "--dtype": "float32"}
    given["--max-batch"] = len(requests)
    command = [sys.executable, "-m", "tita", "serve", "--engine=vllm", "--enforce-eager"]
    command += [f"--{role}={path}" for role, path in paths.items()]
    command += [f"{name}={value}" for name, value in given.items()]
    with (tmp_path / "log").open("w") as log:
        other = subprocess.Popen(command, stderr=log)
        try:
            with vllm_batch(
                paths,
                max_batch=len(requests),
                tensor_parallel=2,
                num_nodes=2,
                leader_address="127.0.0.1",
                leader_port=port,
                processes=True,
                kv_cache_bytes=None,
            ) as batch:
                assert_same(expected, answers(batch, requests))
            assert other.wait(timeout=300) == ExitCode.LOST_PEER, (tmp_path / "log").read_text()
        finally:
            other.kill()
            other.wait()


def test_vocabularies_of_different_widths(tmp_path: Path) -> None:
    paths = wider_pair(tmp_path)
    requests = mixed_requests(3)
    expected = reference_engine(paths).generate(requests)
    with vllm_batch(paths) as batch:
        assert_same(expected, answers(batch, requests))


def test_templates_that_differ_are_refused(tmp_path: Path, random_case: Case) -> None:
    other = llava(
        tmp_path / "reward", seed=9, width=64, heads=2, kv_heads=2, head_size=32, layers=1,
        tied=True,
    )  # fmt: skip
    template = Path(other) / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant:", "answer:"))
    models = load_outlines({"base": random_case[0]["base"], "reward": other})
    with pytest.raises(TitaError, match="the reward model's prompt differs from the base model's"):
        start_vllm(models, VllmOptions(processes=False))


def test_drafts_are_refused(random_case: Case) -> None:
    """By the combined model itself: vLLM can be started with the plugin and without tita."""
    setup = set_up(load_outlines(random_case[0]), VllmOptions(processes=False, compile=False))
    drafting = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    args = dataclasses.replace(setup.args, speculative_config=drafting)
    combined = getattr(guided_models, guided_name(setup.family))
    with pytest.raises(ValueError, match="only the reward model drafts"):
        combined(vllm_config=args.create_engine_config())


def test_base_alone() -> None:
    base = {"base": str(demo_model_path("base"))}
    asked = mixed_requests(3, [Guidance(weight=0.0)])
    with vllm_batch(base) as alone:
        assert answers(alone, asked) == reference_engine(base).generate(asked)
        with pytest.raises(TitaError, match="guidance without a reward model"):
            answers(alone, [Request(question="what is it ?", images=tuple(pictures(1)))])
