"""`--local-model` with tiny models of random weights."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.adapters import save_adapter
from tita.bench import local_model
from tita.bench.local_model import _other_images
from tita.bench.methods import BASE, Method, guided
from tita.bench.questions import BenchmarkItem
from tita.bench.request_body import GenerationOptions
from tita.bench.results_file import read_results
from tita.bench.sample import write_sample
from tita.bench.tasks import BenchmarkTask
from tita.engine.start import start_answer_engine
from tita.errors import TitaError
from tita.vlm.loading import load_vlm


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and a reward model."""
    from tita.demo.tiny_llava import BASE, REWARD, make_model, make_processor

    folder = tmp_path_factory.mktemp("models")
    processor = make_processor()
    for seed, (name, size) in enumerate((("base", BASE), ("reward", REWARD))):
        make_model(size, processor=processor, seed=seed).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


@pytest.fixture
def ask(models: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    from tita.bench.local_model import run_local

    write_sample(tmp_path / "all.jsonl", num=15)
    # Short prompts only: the tiny models have 64 positions.
    lines = (tmp_path / "all.jsonl").read_text().splitlines()
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(f"{line}\n" for line in lines if '"choices"' not in line))

    def run(
        *,
        weight: float | None = None,
        reward: bool = False,
        limit: int | None = None,
        weights: dict[str, float] | None = None,
        rewards: dict[str, str] | None = None,
        method: Method | None = None,
    ) -> Any:
        out = tmp_path / f"r{weight}-{weights}-{method.slug if method else ''}.jsonl"
        task = BenchmarkTask(
            questions=questions,
            images=tmp_path,
            out=out,
            limit=limit,
            generation=GenerationOptions(
                max_new_tokens=4, weight=weight, weights=weights or {}, method=method
            ),
        )
        run_local(
            task,
            name="tiny",
            base=str(models / "base"),
            reward=str(models / "reward") if reward else None,
            rewards=rewards,
            batch_size=5,
        )
        return list(read_results(out))

    return run


def test_base_alone_and_guided(ask: Callable[..., Any], models: Path) -> None:
    alone = ask(weight=None, reward=False)
    assert len(alone) == 12
    first = alone[0]
    assert first["success"] is True
    assert first["model_name"] == "tiny"
    assert first["input_tokens"] > 5
    assert first["output_tokens"] <= 4
    assert first["response_time"] > 0
    assert first["time_to_first_token"] is None, "not measured"
    assert first["usage"] == {"changed_tokens": 0}
    assert len(first["base_sha256"]) == 64
    assert "scores" in first
    unguided = ask(weight=0.0, reward=True)
    assert [r["response"] for r in unguided] == [r["response"] for r in alone]
    guided = ask(weight=1.0, reward=True)
    assert [r["response"] for r in guided] != [r["response"] for r in alone]
    assert sum(r["usage"]["changed_tokens"] for r in guided) > 0
    assert guided[0]["reward_sha256"] != guided[0]["base_sha256"] == first["base_sha256"]


def test_the_models_of_one_run_are_freed_before_those_of_the_next(
    ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that fits base and reward model does not fit two of each."""
    started: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def start(*arguments: Any, **options: Any) -> Any:
        alive.append(sum(each() is not None for each in started))
        engine = start_answer_engine(*arguments, **options)
        started.append(weakref.ref(engine))
        return engine

    local_model._SLOT.clear()
    monkeypatch.setattr(local_model, "start_answer_engine", start)
    ask(weight=0.5, reward=True, limit=1)
    ask(weight=0.7, reward=True, limit=1)
    ask(weight=None, reward=False, limit=1)
    assert alive == [0, 0], "started twice, and the first was gone by then"


def test_only_unanswered_questions_are_asked(ask: Callable[..., Any]) -> None:
    few = ask(weight=None, reward=False, limit=3)
    many = ask(weight=None, reward=False)
    assert (len(few), len(many)) == (3, 12)
    answered = [record for record in few if record["success"]]
    assert answered
    assert [record for record in many if record in answered] == answered, "not asked again"


@pytest.mark.parametrize(("weight", "reward"), [(0.3, False), (None, True)])
def test_weight_and_reward_model_need_each_other(
    ask: Callable[..., Any], weight: float | None, reward: bool
) -> None:
    with pytest.raises(TitaError, match=r"--(weight|reward).* without --"):
        ask(weight=weight, reward=reward)


def test_several_reward_models(ask: Callable[..., Any], models: Path, tmp_path: Path) -> None:
    """The same model twice with half the weight, or once and an adapter at 0, is it once."""
    one, where = ask(weight=0.8, reward=True), str(models / "reward")
    model = load_vlm(where).model.to("cpu")
    adapter = save_adapter(model, tmp_path / "adapter", base=where, seed=1)
    two = ask(weights={"first": 0.4, "again": 0.4}, rewards={"first": where, "again": where})
    assert [r["response"] for r in two] == [r["response"] for r in one]
    assert two[0]["weights"] == {"first": 0.4, "again": 0.4}
    assert two[0]["reward_again_sha256"] == one[0]["reward_sha256"]
    rewards = {"plain": where, "adapted": str(adapter)}
    assert [r["response"] for r in ask(weights={"plain": 0.8, "adapted": 0}, rewards=rewards)] == [
        r["response"] for r in one
    ]
    other = ask(weights={"plain": 0.3, "adapted": 0.5}, rewards=rewards)
    assert [r["response"] for r in other] != [r["response"] for r in one]
    assert other[0]["reward_adapted_sha256"] != other[0]["reward_plain_sha256"]
    with pytest.raises(TitaError, match="no reward model 'polite'; choose from plain, adapted"):
        ask(weights={"polite": 0.3}, rewards=rewards)


def test_methods(ask: Callable[..., Any]) -> None:
    """Each is the same as its options; the controls and best of n answer otherwise."""
    by_weight = answers(ask(weight=0.5, reward=True))
    assert answers(ask(method=guided(0.5), reward=True)) == by_weight
    base = ask(method=BASE)
    assert answers(base) == answers(ask(weight=0.0))
    explained = ask(method=replace(guided(0.5), name="explained", explain=True), reward=True)
    assert answers(explained) == by_weight
    spans = [(r["response"], span) for r in explained for span in r.get("changed", ())]
    assert spans
    assert all(0 <= start < end <= len(text) for text, (start, end) in spans)
    vcd = ask(method=Method(name="vcd", form="vcd", weight=1.0))
    assert [record["request"] for record in vcd[:1]] == [{"method": "vcd", "form": "vcd"}]
    best = ask(method=Method(name="best of 3", best_of=3), reward=True)
    assert best[0]["temperature"] == 1.0
    assert answers(best) != answers(base)
    other = ask(method=guided(0.5, control="other images"), reward=True)
    assert answers(other) != by_weight
    with pytest.raises(TitaError, match="best of 3 without --reward"):
        ask(method=Method(name="best of 3", best_of=3))


def answers(records: list[dict[str, Any]]) -> dict[str, str]:
    return {record["question_id"]: record["response"] for record in records}


def test_other_images_are_other_images() -> None:
    items = [
        BenchmarkItem(id=str(n), text="?", images=images)
        for n, images in enumerate([("a",), ("a",), ("b",), ("c", "d"), ("e", "f"), ()])
    ]
    task = BenchmarkTask(
        questions=Path(), images=Path(), out=Path(),
        generation=GenerationOptions(method=guided(0.3, control="other images")),
    )  # fmt: skip
    others = _other_images(items, task=task)
    assert others == {
        "0": ("b",), "1": ("b",), "2": ("a",), "3": ("e", "f"), "4": ("c", "d"), "5": (),
    }  # fmt: skip
