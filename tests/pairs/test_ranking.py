"""`strategy=judge`: answers are ranked by a judge behind HTTP, or by an implicit reward."""

import json
import math
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from tests.pairs import judge_server
from tests.pairs.conftest import KEY, JudgeProcess
from tests.pairs.workers import start
from tita.align import Engine, Guidance, Request
from tita.data import read_pairs
from tita.demo.models import demo_model_path
from tita.errors import ExitCode, TitaError
from tita.pairs.endpoint import parse_scores
from tita.pairs.implicit_reward import ImplicitRewardRanker, sum_log_probs
from tita.pairs.ranking import Ranking, RankingTask, best_against_worst
from tita.recipes import PairsRecipe, validate_recipe
from tita.records import Question
from tita.storage import Store
from tita.storage.manifest import sha256_of
from tita.vlm.images import open_image
from tita.vlm.loading import Models, load_vlm
from tita.vlm.model_set import digest_of
from tita.vlm.prompts import Prompt


@pytest.mark.slow
def test_the_best_answer_is_preferred_to_the_worst(
    judge: JudgeProcess, store: Store, environment: dict[str, str], tmp_path: Path
) -> None:
    stderr = start(tmp_path, environment, max_questions=12, **judge.recipe).succeed()
    tree = store.pull_tree("pairs/r")
    pairs = list(read_pairs(tree / "pairs.jsonl"))
    lineage = json.loads((tree / "lineage.json").read_text())
    asked = {(r["digest"], r["question"]): r["answers"] for r in judge.requests}
    assert {r["key"] for r in judge.requests} == {f"Bearer {KEY}"}
    assert {(r["model"], *r["size"]) for r in judge.requests} == {("j", 32, 32)}
    images = store.pull_tree("data")
    for pair in pairs:
        assert pair.id.endswith("/judge")
        assert "number" not in pair.question
        answers = asked[sha256_of(images / pair.image), pair.question]
        scores = {answer: judge_server.score(answer) for answer in answers}
        assert scores[pair.chosen] == max(scores.values()) > min(scores.values())
        assert scores[pair.rejected] == min(scores.values())
    dropped, number = lineage["num_dropped"], len(judge.requests)
    assert pairs
    assert dropped["judge: no scores in the reply"] > 0
    assert len(pairs) + sum(dropped.values()) == 12
    assert number == 12 - dropped.get("answers agree", 0)
    cost = {"requests": number, "prompt_tokens": 100 * number, "completion_tokens": 7 * number}
    assert lineage["judge_cost"] == cost
    assert f"judge: {number} requests, {100 * number:,} tokens in, {7 * number} out" in stderr
    assert "best" in (tree / "contact_sheet.html").read_text()
    stored = "".join(file.read_text() for file in tree.rglob("*") if file.is_file())
    assert KEY not in stored + stderr


@pytest.mark.slow
def test_an_outage_ends_the_run_and_a_restart_continues(
    judge: JudgeProcess, store: Store, environment: dict[str, str], tmp_path: Path
) -> None:
    """Finished batches are not paid again, and the key is not repeated from the server's error."""
    recipe = {**judge.recipe, "max_questions": 10, "batch_size": 5}
    judge.fail(401)
    code, stderr = start(tmp_path, environment, **recipe).end()
    assert code == ExitCode.USER
    assert f"{judge.url}: refuses every request" in stderr
    assert "endpoint.key_env" in stderr
    assert KEY not in stderr
    judge.fail(503)
    code, stderr = start(tmp_path, environment, **recipe).end()
    assert code == ExitCode.RETRY
    assert "no request succeeded" in stderr
    judge.fail(None)
    start(tmp_path, environment, **recipe, world_size=2, rank=1).succeed()
    paid = len(judge.requests)
    assert len([*store.list("parts/r/")]) == 1
    start(tmp_path, environment, **recipe).succeed()
    second = judge.requests[paid:]
    lineage = json.loads((store.pull_tree("pairs/r") / "lineage.json").read_text())
    assert 0 < len(second) <= 5
    refused = 2 * lineage["judge_cost"]["requests"]
    assert len(judge.requests) < lineage["judge_cost"]["requests"] + refused
    start(tmp_path, environment, **recipe).succeed()
    assert len(judge.requests) == paid + len(second)


@pytest.mark.slow
def test_a_judge_that_is_another_model_by_now_ranks_all_again(
    judge: JudgeProcess, store: Store, environment: dict[str, str], tmp_path: Path
) -> None:
    """Under the same name: pairs of two judges are never mixed."""
    recipe = {**judge.recipe, "max_questions": 10, "batch_size": 5}
    judge.serve("a" * 64)
    start(tmp_path, environment, **recipe, world_size=2, rank=1).succeed()
    paid = len(judge.requests)
    judge.serve("b" * 64)
    stderr = start(tmp_path, environment, **recipe).succeed()
    assert "1 of 1 finished batches were built with other models or images" in stderr
    lineage = json.loads((store.pull_tree("pairs/r") / "lineage.json").read_text())
    assert lineage["endpoint"] == {"name": "j", "digest": "b" * 64, "served_by": ["j"]}
    assert len(judge.requests) - paid == lineage["judge_cost"]["requests"] > paid > 0


@pytest.mark.slow
def test_a_missing_key_is_an_error_before_any_request(
    judge: JudgeProcess, store: Store, environment: dict[str, str], tmp_path: Path
) -> None:
    del environment["JUDGE_KEY"]
    code, stderr = start(tmp_path, environment, **judge.recipe).end()
    assert code == ExitCode.USER
    assert "no JUDGE_KEY" in stderr
    assert judge.requests == []


@pytest.mark.slow
def test_answers_are_ranked_by_a_trained_model(
    store: Store, environment: dict[str, str], tmp_path: Path
) -> None:
    """The base model in place of a trained one: the ranking is that of its log-ratio."""
    models = {"model": str(demo_model_path("base")), "reference": str(demo_model_path("reward"))}
    recipe = {"strategy": "judge", "temperature": 2.0, "reward": models, "max_questions": 6}
    start(tmp_path, environment, **recipe).succeed()
    tree = store.pull_tree("pairs/r")
    ranker = json.loads((tree / "lineage.json").read_text())["ranker"]
    assert ranker == {
        role: {"name": models[key], "digest": digest_of(models[key])}
        for role, key in (("trained", "model"), ("reference", "reference"))
    }
    trained, reference = load_vlm(models["model"]), load_vlm(models["reference"])
    pairs = list(read_pairs(tree / "pairs.jsonl"))
    assert pairs
    for pair in pairs:
        image = store.pull_tree("data") / pair.image
        task = RankingTask(
            question=Question(id=pair.id, text=pair.question, image=pair.image),
            image=image,
            picture=open_image(image),
            answers=(pair.chosen, pair.rejected),
        )
        (ranking,) = ImplicitRewardRanker(model=trained, reference=reference)([task])
        assert ranking.scores[0] > ranking.scores[1]
    lineage = json.loads((tree / "lineage.json").read_text())
    assert lineage["judge_cost"] is None


def test_log_probabilities_equal_those_of_the_engine(scenes: Path) -> None:
    """The engine reports the log-probability of every token of its own greedy answer."""
    vlm = load_vlm(demo_model_path("base"), dtype="float32")
    row = json.loads((scenes / "train.jsonl").read_text().splitlines()[0])
    image = open_image(scenes / row["image"])
    request = Request(
        question=row["text"], images=(image,), guidance=Guidance(weight=0.0), num_logprobs=0
    )
    tokens: list[Any] = [outcome for _, outcome in Engine(Models(vlm)).stream([request])]
    prompt = Prompt(text=row["text"], images=(image,))
    answer = "".join(token.text for token in tokens)
    with torch.inference_mode():
        found = sum_log_probs(vlm, prompt, [f"{answer} or something longer", answer])
    assert found[1] == pytest.approx(sum(token.logprob or 0.0 for token in tokens), abs=1e-4)
    assert found[0] < found[1]


@pytest.mark.parametrize(
    ("scores", "found"),
    [
        ((1.0, 3.0, 2.0), ("b", "a")),
        ((2.0, 2.0, 2.0), "tie"),
        # As of a model whose logits overflow: every comparison with NaN is false.
        ((math.nan, 3.0, 2.0), "a score is not finite"),
        ((1.0, -math.inf, 2.0), "a score is not finite"),
    ],
)
def test_best_against_worst(scores: tuple[float, ...], found: Any) -> None:
    question = Question(id="7", text="?", image="1.png")
    task = RankingTask(
        question=question, image=Path("1.png"), picture=PIL.Image.new("RGB", (8, 8)),
        answers=("a", "b", "c"),
    )  # fmt: skip
    pair = best_against_worst(task, Ranking(scores=scores))
    assert (pair if isinstance(pair, str) else (pair.chosen, pair.rejected)) == found


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ('{"scores": [1, 10]}', (1.0, 10.0)),
        ('First {"scores": [3, 3]}, then\n```json\n{"scores": [2.5, 4]}\n```', (2.5, 4.0)),
        ('{"scores": [1]}', None),
        ('{"scores": [1, "2"]}', None),
        ('{"scores": [1, true]}', None),
        ('{"scores": [0, 5]}', None),
        ('{"scores": [NaN, 5]}', None),
        ("[1, 2]", None),
        ("", None),
    ],
)
def test_scores_are_read_or_refused(reply: str, scores: tuple[float, ...] | None) -> None:
    assert parse_scores(reply, number=2) == scores


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"strategy": "judge", "temperature": 1}, "either `endpoint` or `reward`"),
        ({"strategy": "judge", "reward": {"model": "a", "reference": "b"}}, "--set temperature=1"),
        ({"samples": 8}, "`samples` has no effect"),
        ({"strategy": "judge", "noise": "ddpm"}, "`noise` has no effect"),
    ],
)
def test_keys_that_do_not_fit_the_strategy_are_refused(recipe: dict[str, Any], words: str) -> None:
    with pytest.raises(TitaError) as error:
        validate_recipe(PairsRecipe, {"questions": "data", **recipe})
    assert words in str(error.value)
