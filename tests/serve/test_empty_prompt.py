"""A prompt without tokens is refused where it is read, and hurts nobody else."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from serve_process import Server

from tita.align import Engine, Request
from tita.errors import TitaError
from tita.serve.model_loading import LoadedModels


@pytest.mark.parametrize("prompt", ["", " ", "\n\t "])
def test_the_worker_refuses_it_and_others_go_on(
    server: Server, client: openai.OpenAI, prompt: str
) -> None:
    def victim(seed: int) -> str:
        answer = client.chat.completions.create(
            model="tita", messages=[{"role": "user", "content": "describe"}], seed=seed,
            temperature=1.5, max_tokens=40, extra_body={"ignore_eos": True},
        )  # fmt: skip
        return answer.choices[0].message.content or ""

    wanted = [victim(seed) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        victims = [pool.submit(victim, seed) for seed in range(2)]
        for _ in range(5):
            url, body = f"{server.url}/worker_generate_stream", {"model": "tita", "prompt": prompt}
            found = httpx.post(url, json=body)
            chunk = json.loads(found.content.rstrip(b"\0"))
            assert (found.status_code, chunk["error_code"]) == (400, 1)
            assert "the prompt is empty" in chunk["text"]
        assert [each.result() for each in victims] == wanted
    assert server.idle_within(60)


def test_the_python_api_refuses_it(models: LoadedModels) -> None:
    engine, good = Engine(models.models), Request(question="what")
    (wanted,) = engine.generate([good])
    for raw in ("", " "):
        found = engine.generate([good, Request(raw=raw), good], return_errors=True)
        assert [found[0], found[2]] == [wanted, wanted]
        assert "the prompt is empty" in str(found[1])
        with pytest.raises(TitaError, match="the prompt is empty"):
            engine.preparer.prepare(Request(raw=raw))
